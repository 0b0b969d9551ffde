import pytest
import torch
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint

from tests.passes.helpers import operators
from tfmq_fx.passes import (
    DecomposeAttention,
    FlattenLinearInputs,
    IndexTimesteps,
    RemoveDropouts,
    RemoveIdentityArithmetic,
    RemoveNoopCasts,
    SplitConcatenatedConvs,
    StripDeadState,
    TabulateTemporalBlock,
)
from tfmq_fx.testing import GraphBuilder, TimePath, build_temporal_graph

aten = torch.ops.aten


def graph():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 3, 3))
    h = builder.call(aten.dropout.default, x, 0.5, False)
    h = builder.call(aten.mul.Tensor, builder.call(aten.to.dtype, h, torch.float32), 1)
    cat = builder.call(aten.cat.default, [h, builder.call(aten.silu.default, x)], 1)
    h = builder.call(aten.conv2d.default, cat, builder.weight("conv.weight", (4, 8, 1, 1)))
    h = builder.call(aten.linear.default, h, builder.weight("fc.weight", (3, 3)))
    return builder.build(builder.call(aten.scaled_dot_product_attention.default, h, h, h))


def test_several_passes_run_in_order_and_compute_the_same():
    graph_module, x = graph(), torch.randn(2, 4, 3, 3)
    before = graph_module(x)
    passes = [
        RemoveDropouts(),
        RemoveIdentityArithmetic(),
        RemoveNoopCasts(),
        SplitConcatenatedConvs(),
        FlattenLinearInputs(),
        DecomposeAttention(),
        StripDeadState(),
    ]
    result = PassManager(passes=passes)(graph_module)
    assert result.modified
    found = operators(result.graph_module)
    gone = (aten.dropout.default, aten.to.dtype, aten.cat.default, aten.scaled_dot_product_attention.default)
    assert not any(found[target] for target in gone)
    assert found[aten.conv2d.default] == 2 and found[aten.matmul.default] == 2
    assert torch.allclose(result.graph_module(x), before, rtol=1e-4, atol=1e-6)


def test_a_second_run_changes_nothing():
    manager = PassManager(passes=[RemoveDropouts(), SplitConcatenatedConvs(), StripDeadState()])
    once = manager(graph())
    assert once.modified
    assert not manager(once.graph_module).modified


def test_the_order_constraint_of_the_manager_holds_for_our_passes():
    constraint = this_before_that_pass_constraint(IndexTimesteps, TabulateTemporalBlock)
    with pytest.raises(RuntimeError, match="constraint"):
        PassManager(passes=[TabulateTemporalBlock, IndexTimesteps], constraints=[constraint]).validate_constraints()


def test_options_are_bound_when_the_list_is_made():
    model = build_temporal_graph(TimePath(timestep_name="t"))
    passes = [IndexTimesteps([7, 999], timestep="t"), TabulateTemporalBlock(timestep="t"), StripDeadState()]
    inputs = model.example_inputs((7, 999))
    before = model.graph_module(*inputs)
    result = PassManager(passes=passes)(model.graph_module)
    assert operators(result.graph_module)[aten.linear.default] == 0
    assert torch.allclose(result.graph_module(*inputs), before, rtol=1e-4, atol=1e-5)
