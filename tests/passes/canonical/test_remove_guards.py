import operator
import warnings

import pytest
import torch

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import RemoveGuards
from tfmq_fx.passes.canonical.remove_guards import is_guard
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def guarded():
    """A size check, a metadata check and an element check; ``ge`` feeds two of its readers' chains."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 4))
    size = builder.call(aten.sym_size.int, x, 0)
    builder.call(aten._assert_scalar.default, builder.call(operator.ge, size, 1), "empty")
    builder.call(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    ones = builder.call(aten.ones_like.default, x, dtype=torch.bool)
    builder.call(aten._assert_async.msg, builder.call(aten.all.default, ones), "not all")
    return builder.build(builder.call(aten.silu.default, x))


def test_fires():
    graph_module = guarded()
    assert RemoveGuards()(graph_module).modified
    assert operators(graph_module) == {aten.silu.default: 1}


def test_fires_on_the_guards_function_of_an_exported_module():
    class Half(torch.nn.Module):
        def forward(self, x):
            return x[: x.shape[0] // 2].sin()

    program = torch.export.export(Half(), (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    graph_module = program.module()
    assert hasattr(graph_module, "_guards_fn")
    x = torch.randn(6, 3)
    before = graph_module(x)
    assert RemoveGuards()(graph_module).modified
    assert not hasattr(graph_module, "_guards_fn")
    assert not any(node.op == "call_module" for node in graph_module.graph.nodes)
    assert torch.equal(graph_module(x), before)


def test_does_not_fire_without_guards():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    builder.call(aten.ge.Scalar, x, 0)
    assert unchanged(RemoveGuards(), builder.build(builder.call(aten.silu.default, x)))


def test_a_guard_with_a_reader_stays():
    builder = GraphBuilder()
    builder.placeholder("x", (2, 4))
    check = builder.call(torch._check, True)
    assert unchanged(RemoveGuards(), builder.build(check))


def test_needs_no_values():
    graph_module = guarded()
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)
    assert RemoveGuards()(graph_module).modified


def test_numerics():
    more = [(torch.randn(1, 4),), (torch.randn(5, 4),)]
    result = assert_pass_contract(RemoveGuards, guarded(), (torch.randn(2, 4),), exact=True, more_inputs=more)
    # The check itself is gone, that is the point of the pass.
    assert result.graph_module(torch.randn(0, 4)).shape == (0, 4)


def test_a_condition_with_several_users_stays_for_the_others():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 4))
    size = builder.call(aten.sym_size.int, x, 0)
    condition = builder.call(operator.ge, size, 1)
    builder.call(aten._assert_scalar.default, condition, "empty")
    builder.call(aten._assert_scalar.default, condition, "empty again")
    graph_module = builder.build(builder.call(aten.new_zeros.default, x, [size]))
    result = assert_pass_contract(RemoveGuards, graph_module, (torch.randn(2, 4),), exact=True)
    assert operators(result.graph_module) == {aten.sym_size.int: 1, aten.new_zeros.default: 1}


def test_conditions_made_from_each_other_are_erased_once():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    low = builder.call(aten.ge.Scalar, x, -1)
    both = builder.call(aten.logical_and.default, low, builder.call(aten.logical_not.default, low))
    builder.call(aten._assert_async.default, builder.call(aten.all.default, builder.call(aten.logical_or, both, low)))
    graph_module = builder.build(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RemoveGuards()(graph_module).modified
    assert not operators(graph_module)


@pytest.mark.parametrize("target", ["_assert_scalar.default", "sym_constrain_range.default", "_assert_async.default"])
def test_predicate(target):
    packet, overload = target.split(".")
    graph = torch.fx.Graph()
    guard = graph.call_function(getattr(getattr(aten, packet), overload), ())
    assert is_guard(guard) and not is_guard(graph.call_function(aten.silu.default, ()))
