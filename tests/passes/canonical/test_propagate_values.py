import operator

import pytest
import torch
from torch import nn

from tests.passes.helpers import unchanged
from tfmq_fx.passes import PassError, PropagateValues
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def graph(*, dynamic=False, bare=True):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4))
    size = builder.call(aten.sym_size.int, x, 0) if dynamic else 2
    halves = builder.call(aten.chunk.default, builder.call(aten.pad.default, x, [1, 1]), 2, 1)
    first = builder.call(operator.getitem, halves, 0)
    seen = builder.call_module("observer", nn.Identity(), first)
    ones = builder.call(aten.ones.default, [size, 3])
    graph_module = builder.build((builder.call(aten.add.Tensor, seen, ones), builder.weight("weight", (3,)), seen))
    if bare:
        for node in graph_module.graph.nodes:
            if node.op != "placeholder":
                node.meta.pop("val", None)
    return graph_module


@pytest.mark.parametrize("dynamic", [False, True])
def test_fires(dynamic):
    graph_module, wanted = graph(dynamic=dynamic), graph(dynamic=dynamic, bare=False)
    assert PropagateValues()(graph_module).modified
    for node, like in zip(graph_module.graph.nodes, wanted.graph.nodes, strict=True):
        assert str(node.meta.get("val")) == str(like.meta.get("val"))


def test_a_symbolic_batch_stays_symbolic():
    graph_module = graph(dynamic=True)
    PropagateValues()(graph_module)
    sizes = [
        n.meta["val"].shape[0] for n in graph_module.graph.nodes if n.target in (aten.pad.default, aten.ones.default)
    ]
    assert len(sizes) == 2
    assert all(isinstance(size, torch.SymInt) and not size.node.expr.is_number for size in sizes)


def test_does_not_fire_when_all_values_are_there():
    graph_module = graph(bare=False)
    first = next(node for node in graph_module.graph.nodes if node.op == "call_function")
    value = first.meta["val"]
    assert unchanged(PropagateValues(), graph_module)
    assert first.meta["val"] is value


def test_numerics():
    assert_pass_contract(PropagateValues, graph(), (torch.randn(2, 4),), exact=True, may_set=["val"])


def test_a_value_with_several_users_is_computed_from_the_one_that_is_there():
    graph_module = graph(bare=False)
    node = next(n for n in graph_module.graph.nodes if n.target is operator.getitem)
    value = node.meta["val"]
    for user in node.users:
        user.meta.pop("val", None)
    assert PropagateValues()(graph_module).modified
    assert node.meta["val"] is value and all(
        user.meta["val"] is value for user in node.users if user.op == "call_module"
    )


def test_an_input_without_value_is_named():
    graph_module = graph()
    next(iter(graph_module.graph.nodes)).meta.clear()
    with pytest.raises(PassError, match=r"input 'x' has no meta\['val'\] to start from; capture"):
        PropagateValues()(graph_module)
