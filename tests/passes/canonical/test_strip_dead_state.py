import pytest
import torch
from torch import fx, nn

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import StripDeadState
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def graph():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    builder.placeholder("unread", (3,))
    weight = builder.weight("block.fc.weight", (4, 4))
    dead = builder.call(aten.linear.default, x, builder.weight("block.dead.weight", (4, 4)))
    builder.call(aten.silu.default, dead)
    return builder.build(builder.call(aten.linear.default, x, weight))


def test_fires_on_nodes_tensors_and_modules():
    graph_module = graph()
    graph_module.register_buffer("unread_buffer", torch.ones(2))
    graph_module.add_submodule("left.over", nn.Linear(2, 2))
    graph_module.plain = torch.ones(3)
    assert StripDeadState()(graph_module).modified
    assert operators(graph_module) == {aten.linear.default: 1}
    assert list(graph_module.state_dict()) == ["block.fc.weight"]
    assert [name for name, _ in graph_module.named_modules()] == ["", "block", "block.fc"]
    assert not hasattr(graph_module, "plain")
    assert [node.name for node in graph_module.graph.nodes if node.op == "placeholder"] == ["x", "unread"]


def test_does_not_fire_twice():
    graph_module = graph()
    StripDeadState()(graph_module)
    assert unchanged(StripDeadState(), graph_module)


@pytest.mark.parametrize("target, args", [(aten.add_.Tensor, (1.0,)), (torch._assert, ("message",))])
def test_a_node_with_an_effect_stays(target, args):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    builder.graph.call_function(target, (x, *args))
    graph_module = builder.build(x)
    assert unchanged(StripDeadState(), graph_module)


def test_a_random_draw_stays_because_the_next_one_depends_on_it():
    builder = GraphBuilder()
    builder.call(aten.rand.default, [2])
    assert unchanged(StripDeadState(), builder.build(builder.call(aten.rand.default, [2])))


def test_needs_no_values():
    graph_module = graph()
    for node in graph_module.graph.nodes:
        node.meta.clear()
    assert StripDeadState()(graph_module).modified


def test_numerics():
    assert_pass_contract(StripDeadState, graph(), (torch.randn(2, 4), torch.randn(3)), exact=True)


def test_state_with_several_users_stays_until_the_last():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    weight = builder.weight("weight", (4, 4))
    kept = builder.call(aten.linear.default, x, builder.read("weight"))
    builder.call(aten.linear.default, x, weight)
    result = assert_pass_contract(StripDeadState, builder.build(kept), (torch.randn(2, 4),), exact=True)
    assert list(result.graph_module.state_dict()) == ["weight"]
    assert operators(result.graph_module) == {aten.linear.default: 1}


def shared_layer(*, read_alive):
    """One module under two names, of which the second is not read any more."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module("first", nn.Linear(4, 4))
    root.add_module("second", root.first)
    x = graph.placeholder("x")
    for name in ("first", "second"):
        last = graph.call_module(name, (x,))
    graph_module = fx.GraphModule(root, graph)
    graph.output(next(iter(last.prev.users), last.prev) if read_alive else x)
    graph_module.recompile()
    return graph_module


def test_a_module_under_two_names_survives_under_the_one_that_is_read():
    graph_module, x = shared_layer(read_alive=True), torch.randn(2, 4)
    before = graph_module(x)
    assert StripDeadState()(graph_module).modified
    assert [name for name, _ in graph_module.named_children()] == ["first"]
    assert torch.equal(graph_module(x), before)


def test_a_module_under_two_names_goes_when_neither_is_read():
    graph_module = shared_layer(read_alive=False)
    assert StripDeadState()(graph_module).modified
    assert not list(graph_module.named_children())


def test_a_called_module_keeps_all_its_state():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    graph_module = builder.build(builder.call_module("observers.first", nn.BatchNorm1d(4), x))
    assert unchanged(StripDeadState(), graph_module)
