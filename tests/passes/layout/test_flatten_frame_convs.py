import pytest
import torch
from torch import nn

import tfmq_fx
from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import FlattenFrameConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def video(kernel=(3, 1, 1), *, window=([1, 1, 1], [1, 0, 0]), bias=True, groups=1, dynamic=False):
    """One 3-d convolution of a batch of videos of 5 frames of 4 x 6."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4, 5, 4, 6))
    with builder.inside("frames"):
        weight = builder.weight("frames.weight", (8, 4 // groups, *kernel))
        shift = builder.weight("frames.bias", (8,)) if bias else None
        rest = (*window, [1, 1, 1], groups) if window else ()
        y = builder.call(aten.conv3d.default, x, weight, shift, *rest)
    return builder.build(y)


def inputs(batch=2):
    return (torch.randn(batch, 4, 5, 4, 6, generator=torch.Generator().manual_seed(0)),)


def test_fires():
    graph_module = video()
    assert FlattenFrameConvs()(graph_module).modified
    assert operators(graph_module) == {aten.reshape.default: 2, aten.conv2d.default: 1}
    (conv,) = calls(graph_module, aten.conv2d.default)
    assert conv.meta["val"].shape == (2, 8, 5, 24) and conv.args[1].meta["val"].shape == (8, 4, 3, 1)
    assert list(conv.meta["nn_module_stack"])[-1] == "frames"


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        ((3, 3, 3), ([1, 1, 1], [1, 1, 1])),
        ((1, 3, 1), ([1, 1, 1], [0, 1, 0])),
        ((3, 1, 1), ([1, 2, 2], [1, 0, 0])),  # drops every second position of a frame
        ((3, 1, 1), ([1, 1, 1], [1, 1, 1])),  # adds a border of the bias alone
    ],
)
def test_does_not_fire_on_what_looks_along_height_or_width(kernel, window):
    assert unchanged(FlattenFrameConvs(), video(kernel, window=window))


def test_does_not_fire_on_a_computed_weight_or_without_a_batch():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 5, 4, 6))
    computed = builder.call(aten.sin.default, builder.weight("w", (8, 4, 3, 1, 1)))
    one = builder.call(aten.conv3d.default, x, computed)
    single = builder.call(aten.select.int, x, 0, 0)
    two = builder.call(aten.conv3d.default, single, builder.weight("v", (8, 4, 3, 1, 1)))
    assert unchanged(FlattenFrameConvs(), builder.build((one, two)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"window": ()},
        {"groups": 4},
        {"window": ([2, 1, 1], [2, 0, 0])},
        {"kernel": (1, 1, 1), "window": ()},
    ],
)
def test_numerics(options):
    assert_pass_contract(FlattenFrameConvs, video(**options), inputs())


def test_numerics_of_a_symbolic_batch():
    assert_pass_contract(FlattenFrameConvs, video(dynamic=True), inputs(), more_inputs=[inputs(1), inputs(3)])


def test_several_users_of_input_weight_and_result():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 5, 4, 6))
    weight = builder.weight("w", (4, 4, 3, 1, 1))
    one = builder.call(aten.conv3d.default, x, weight, None, [1, 1, 1], [1, 0, 0])
    two = builder.call(aten.conv3d.default, one, weight, None, [1, 1, 1], [1, 0, 0])
    total = builder.call(aten.add.Tensor, builder.call(aten.add.Tensor, one, x), two)
    result = assert_pass_contract(FlattenFrameConvs, builder.build((total, one)), inputs())
    assert operators(result.graph_module)[aten.conv2d.default] == 2


def test_a_convolution_along_frames_is_eligible_for_an_integer_kernel():
    along_frames = nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0))
    model = nn.Sequential(nn.Conv3d(2, 2, 1), along_frames, nn.Conv3d(4, 2, 1)).eval()
    x = torch.randn(2, 2, 5, 4, 4)
    config = tfmq_fx.QuantizationConfig(temporal="float")
    program = tfmq_fx.quantize(model, config, [(x,)], progress=False)
    report = tfmq_fx.lower(program, "reference").report
    assert [(entry.name, entry.operator) for entry in report.entries if entry.eligible] == [("1", "conv2d")]
