import warnings

import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import SplitConcatenatedConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def shortcut(*, axis=1, widths=(3, 5), bias="position", kernel=1, dynamic=False, options=(), **named):
    """A convolution of a concatenation, as in the up blocks of a UNet."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    parts = [builder.placeholder(f"part{i}", (builder.batch, width, 6, 6)) for i, width in enumerate(widths)]
    with builder.inside("up.conv_shortcut"):
        cat = builder.call(aten.cat.default, parts, axis)
        groups = named.get("groups", options[3] if len(options) > 3 else 1)
        channels = int(cat.meta["val"].shape[1]) // groups
        arguments = [cat, builder.weight("up.conv_shortcut.weight", (4, channels, kernel, kernel))]
        if bias == "name":
            named["bias"] = builder.weight("up.conv_shortcut.bias", (4,))
        elif bias == "position":
            arguments.append(builder.weight("up.conv_shortcut.bias", (4,)))
        elif options:
            arguments.append(None)
        return builder.build(builder.call(aten.conv2d.default, *arguments, *options, **named))


def inputs(batch=2, widths=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, width, 6, 6, generator=generator) for width in widths)


SPLIT = [
    {},
    {"axis": -3},
    {"bias": "name"},
    {"bias": None},
    {"kernel": 3, "options": ([2, 2], [1, 1])},
    {"bias": "name", "kernel": 3, "padding": [2, 2], "dilation": [2, 2]},
    {"widths": (3, 1, 4)},
]


@pytest.mark.parametrize("options", SPLIT)
def test_fires(options):
    graph_module = shortcut(**options)
    assert SplitConcatenatedConvs()(graph_module).modified
    convs = calls(graph_module, aten.conv2d.default)
    widths = options.get("widths", (3, 5))
    assert [conv.args[0].name for conv in convs] == [f"part{i}" for i in range(len(widths))]
    assert operators(graph_module)[aten.cat.default] == 0
    assert operators(graph_module)[aten.add.Tensor] == len(widths) - 1
    assert all(conv.meta["nn_module_stack"]["up.conv_shortcut"] for conv in convs)


def test_the_bias_is_added_once_and_the_weight_is_cut():
    graph_module = shortcut()
    weight = graph_module.get_parameter("up.conv_shortcut.weight")
    SplitConcatenatedConvs()(graph_module)
    first, second = calls(graph_module, aten.conv2d.default)
    assert first.args[2].name == "up_conv_shortcut_bias" and second.args[2] is None
    state = dict(graph_module.named_buffers())
    assert torch.equal(torch.cat([state[str(conv.args[1].target)] for conv in (first, second)], 1), weight)


@pytest.mark.parametrize(
    "options",
    [
        {"axis": 2, "widths": (4, 4)},
        {"axis": 0, "widths": (4, 4)},
        {"widths": (4, 4), "options": ([1, 1], [0, 0], [1, 1], 2)},
        {"widths": (4, 4), "groups": 2},
        {"widths": (4,)},
    ],
)
def test_does_not_fire(options):
    assert unchanged(SplitConcatenatedConvs(), shortcut(**options))


def test_does_not_fire_on_an_image_without_batch_axis():
    builder = GraphBuilder()
    x = builder.placeholder("x", (4, 6, 6))
    cat = builder.call(aten.cat.default, [x, x], 1)
    graph_module = builder.build(builder.call(aten.conv2d.default, cat, builder.weight("weight", (2, 4, 1, 1))))
    assert unchanged(SplitConcatenatedConvs(), graph_module)


def test_does_not_fire_on_a_concatenation_that_promotes():
    builder = GraphBuilder()
    x, y = builder.placeholder("x", (2, 2, 4, 4)), builder.placeholder("y", (2, 2, 4, 4), torch.bfloat16)
    cat = builder.call(aten.cat.default, [x, y], 1)
    graph_module = builder.build(builder.call(aten.conv2d.default, cat, builder.weight("weight", (2, 4, 1, 1))))
    assert unchanged(SplitConcatenatedConvs(), graph_module)


def test_does_not_fire_on_a_computed_weight():
    builder = GraphBuilder()
    x, weight = builder.placeholder("x", (2, 2, 4, 4)), builder.placeholder("weight", (3, 4, 1, 1))
    cat = builder.call(aten.cat.default, [x, x], 1)
    assert unchanged(SplitConcatenatedConvs(), builder.build(builder.call(aten.conv2d.default, cat, weight)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", SPLIT)
def test_numerics(options, dynamic):
    widths = options.get("widths", (3, 5))
    more = [inputs(1, widths), inputs(5, widths)] if dynamic else []
    graph_module = shortcut(dynamic=dynamic, **options)
    assert_pass_contract(SplitConcatenatedConvs, graph_module, inputs(widths=widths), rtol=1e-5, more_inputs=more)


def test_several_users_keep_the_concatenation_and_the_weight():
    builder = GraphBuilder()
    x, y = (builder.placeholder(name, (2, 2, 4, 4)) for name in "xy")
    cat = builder.call(aten.cat.default, [x, y], 1)
    weight = builder.weight("weight", (4, 4, 1, 1))
    first = builder.call(aten.conv2d.default, cat, weight)
    second = builder.call(aten.conv2d.default, builder.call(aten.silu.default, cat), weight)
    third = builder.call(aten.conv2d.default, cat, weight)
    graph_module = builder.build((builder.call(aten.add.Tensor, first, second), third))
    example = (torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4))
    result = assert_pass_contract(SplitConcatenatedConvs, graph_module, example, rtol=1e-5)
    found = operators(result.graph_module)
    assert found[aten.cat.default] == 1 and found[aten.conv2d.default] == 5


def test_a_concatenation_of_concatenations_is_split_into_all_its_parts():
    builder = GraphBuilder()
    x, y, z = (builder.placeholder(name, (2, 2, 4, 4)) for name in "xyz")
    inner = builder.call(aten.cat.default, [x, y], 1)
    outer = builder.call(aten.cat.default, [inner, z, inner], -3)
    graph_module = builder.build(builder.call(aten.conv2d.default, outer, builder.weight("weight", (3, 10, 1, 1))))
    example = tuple(torch.randn(2, 2, 4, 4) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = assert_pass_contract(SplitConcatenatedConvs, graph_module, example, rtol=1e-5)
    parts = [conv.args[0].name for conv in calls(result.graph_module, aten.conv2d.default)]
    assert parts == ["x", "y", "z", "x", "y"]
    assert operators(result.graph_module)[aten.cat.default] == 0


@pytest.mark.parametrize("reads", [1, 2])
def test_the_whole_weight_goes_with_its_last_reader(reads):
    builder = GraphBuilder()
    x, y = builder.placeholder("x", (2, 4, 5, 5)), builder.placeholder("y", (2, 4, 5, 5))
    weight = builder.weight("conv.weight", (8, 8, 1, 1))
    results = [builder.call(aten.conv2d.default, builder.call(aten.cat.default, [x, y], 1), weight)]
    if reads == 2:
        results.append(builder.call(aten.mean.default, builder.read("conv.weight")))
    graph_module = builder.build(tuple(results))
    assert SplitConcatenatedConvs()(graph_module).modified
    assert ("conv.weight" in graph_module.state_dict()) == (reads == 2)
    graph_module(torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5))
