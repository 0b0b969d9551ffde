import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import WidenSequenceConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def sequence(kernel=5, *, window=([1], [2]), bias=True, groups=1, dynamic=False, readers=1):
    """One 1-d convolution, or several of the same weight, of a batch of sequences of length 12."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4, 12))
    with builder.inside("conv"):
        weight = builder.weight("conv.weight", (8, 4 // groups, kernel))
        shift = builder.weight("conv.bias", (8,)) if bias else None
        rest = (*window, [1], groups) if window else ()
        outputs = [builder.call(aten.conv1d.default, x, weight, shift, *rest) for _ in range(readers)]
    return builder.build(outputs[0] if readers == 1 else tuple(outputs))


def inputs(batch=2):
    return (torch.randn(batch, 4, 12, generator=torch.Generator().manual_seed(0)),)


def test_fires():
    graph_module = sequence()
    assert WidenSequenceConvs()(graph_module).modified
    assert operators(graph_module) == {aten.unsqueeze.default: 1, aten.conv2d.default: 1, aten.squeeze.dim: 1}
    (conv,) = calls(graph_module, aten.conv2d.default)
    assert conv.meta["val"].shape == (2, 8, 1, 12) and conv.args[1].meta["val"].shape == (8, 4, 1, 5)
    assert list(conv.meta["nn_module_stack"])[-1] == "conv"


def test_does_not_fire_on_a_kernel_of_one_or_a_computed_weight():
    assert unchanged(WidenSequenceConvs(), sequence(1, window=()))
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 12))
    computed = builder.call(aten.sin.default, builder.weight("w", (8, 4, 3)))
    assert unchanged(WidenSequenceConvs(), builder.build(builder.call(aten.conv1d.default, x, computed)))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"window": ()}, {"groups": 4}, {"window": ([2], [0])}, {"kernel": 2, "window": ([3], [1])}],
)
def test_numerics(options):
    assert_pass_contract(WidenSequenceConvs, sequence(**options), inputs())


def test_numerics_of_a_symbolic_batch():
    assert_pass_contract(WidenSequenceConvs, sequence(dynamic=True), inputs(), more_inputs=[inputs(1), inputs(3)])


def test_several_users():
    assert_pass_contract(WidenSequenceConvs, sequence(readers=3), inputs())
