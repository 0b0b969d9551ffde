"""Arguments of calls, read as what the operator takes."""

import operator

import pytest
import torch
from torch import fx

from tfmq_fx.passes.support.arguments import argument_list, argument_node, called_operator

aten = torch.ops.aten


@pytest.fixture
def nodes():
    graph = fx.Graph()
    x = graph.placeholder("x")
    return x, graph.call_function(aten.cat.default, ([x, x], 1))


def test_a_node_is_read_as_one_and_nothing_else_is(nodes):
    x, cat = nodes
    item = x.graph.call_function(operator.getitem, (cat, 0))
    assert argument_node(item, 0) is cat
    with pytest.raises(TypeError, match="argument 1 of node 'getitem' should be a node, not 0"):
        argument_node(item, 1)


def test_a_list_is_read_as_one_and_nothing_else_is(nodes):
    x, cat = nodes
    assert list(argument_list(cat, 0)) == [x, x]
    with pytest.raises(TypeError, match="argument 1 of node 'cat_default' should be a list, not 1"):
        argument_list(cat, 1)


def test_a_function_is_called_by_calls_alone(nodes):
    x, cat = nodes
    assert called_operator(cat) is aten.cat.default
    with pytest.raises(TypeError, match=r"node 'x' \(placeholder\) calls no function"):
        called_operator(x)
