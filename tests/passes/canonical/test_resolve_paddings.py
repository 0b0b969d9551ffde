import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import ResolvePaddings
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten
PADDED = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}
NUMERIC = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def named(kernel, padding="same", *, stride=None, dilation=(), groups=1, dynamic=False, readers=1):
    """One convolution whose padding has a name, or several of the same weight."""
    rank = len(kernel)
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4, *[9, 8, 7][:rank]))
    with builder.inside("conv"):
        weight = builder.weight("conv.weight", (6, 4 // groups, *kernel))
        bias = builder.weight("conv.bias", (6,))
        rest = (stride or [1] * rank, padding, list(dilation) or [1] * rank, groups)
        outputs = [builder.call(PADDED[rank], x, weight, bias, *rest) for _ in range(readers)]
    return builder.build(outputs[0] if readers == 1 else tuple(outputs))


def inputs(rank, batch=2):
    return (torch.randn(batch, 4, *[9, 8, 7][:rank], generator=torch.Generator().manual_seed(0)),)


def test_fires():
    graph_module = named((3, 4))
    assert ResolvePaddings()(graph_module).modified
    assert operators(graph_module) == {aten.pad.default: 1, aten.conv2d.default: 1}
    (conv,) = calls(graph_module, aten.conv2d.default)
    (pad,) = calls(graph_module, aten.pad.default)
    assert conv.args[4] == [1, 1] and pad.args[1] == [0, 1, 0, 0]
    assert list(conv.meta["nn_module_stack"])[-1] == list(pad.meta["nn_module_stack"])[-1] == "conv"


def test_an_odd_kernel_needs_no_border_of_its_own():
    graph_module = named((3, 5), dilation=(2, 1))
    ResolvePaddings()(graph_module)
    (conv,) = calls(graph_module, aten.conv2d.default)
    assert operators(graph_module) == {aten.conv2d.default: 1} and conv.args[4] == [2, 2]


def test_does_not_fire_on_numbers():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 9, 8))
    conv = builder.call(aten.conv2d.default, x, builder.weight("w", (6, 4, 3, 3)), None, [1, 1], [1, 1])
    assert unchanged(ResolvePaddings(), builder.build(conv))


@pytest.mark.parametrize("kernel", [(2,), (3,), (4,), (1, 2), (4, 3), (2, 2), (2, 3, 1), (1, 4, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"dilation": (2,)}, {"groups": 2}, {"padding": "valid"}, {"padding": "valid", "stride": [2]}]
)
def test_numerics(kernel, options):
    rank = len(kernel)
    options = {name: value * rank if name in ("dilation", "stride") else value for name, value in options.items()}
    if options.get("padding") == "valid":
        kernel = tuple(min(size, 3) for size in kernel)
    graph_module = named(kernel, **options)
    assert assert_pass_contract(ResolvePaddings, graph_module, inputs(rank)).modified
    assert not calls(graph_module, NUMERIC[rank])


def test_numerics_of_a_symbolic_batch():
    more = [inputs(2, 1), inputs(2, 3)]
    assert_pass_contract(ResolvePaddings, named((4, 2), dynamic=True), inputs(2), more_inputs=more)


def test_several_users():
    assert_pass_contract(ResolvePaddings, named((2, 3), readers=3), inputs(2))
