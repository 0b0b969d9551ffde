import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import RemoveDropouts
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def graph(*args, target=aten.dropout.default, **kwargs):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 3))
    dropped = builder.call(target, builder.call(aten.silu.default, x), *args, **kwargs)
    return builder.build(builder.call(aten.sin.default, dropped))


IDLE = [((0.0, True), {}), ((0.5, False), {}), ((0.0, False), {}), ((), {"p": 0.5, "train": False})]


@pytest.mark.parametrize("args, kwargs", IDLE)
@pytest.mark.parametrize("target", [aten.dropout.default, aten.feature_dropout.default])
def test_fires(args, kwargs, target):
    graph_module = graph(*args, target=target, **kwargs)
    assert RemoveDropouts()(graph_module).modified
    assert operators(graph_module) == {aten.silu.default: 1, aten.sin.default: 1}


def test_does_not_fire_on_a_live_dropout():
    assert unchanged(RemoveDropouts(), graph(0.5, True))


@pytest.mark.parametrize("args, kwargs", IDLE)
def test_numerics(args, kwargs):
    assert_pass_contract(RemoveDropouts, graph(*args, **kwargs), (torch.randn(2, 4, 3),), exact=True)


def test_several_users_and_a_chain():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    first = builder.call(aten.dropout.default, x, 0.5, False)
    second = builder.call(aten.dropout.default, first, 0.0, True)
    outputs = (builder.call(aten.add.Tensor, first, second), builder.call(aten.sin.default, second), first)
    result = assert_pass_contract(RemoveDropouts, builder.build(outputs), (torch.randn(2, 4),), exact=True)
    (add,) = calls(result.graph_module, aten.add.Tensor)
    assert [node.name for node in add.args] == ["x", "x"]
    assert result.graph_module.graph.output_node().args[0][2].name == "x"
