"""Data dependence: which inputs of a graph the *values* of each node depend on.

An argument that gives an operator only a shape, a dtype or a device carries no data: with a dynamic
batch, ``sym_size(sample, 0)`` stands on the time path without making it depend on the sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.support.predicates import SHAPE_ONLY_ARGUMENTS

__all__ = ["data_arguments", "data_dependence", "reads_as_parameter"]


def _schema_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return str(schema_of(target).name)
    return ""


def _nodes(argument: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node)]


def data_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes of ``node`` whose values its own value depends on.

    ``aten.to.other`` and ``expand_as`` read the other tensor's dtype or shape only; ``ones_like`` and
    ``sym_size`` read no data at all.
    """
    name = _schema_name(node)
    if name == "aten::to" and node.target is torch.ops.aten.to.other:
        return _nodes(node.args[0])
    if name in SHAPE_ONLY_ARGUMENTS:
        data = [node.args[i] for i in SHAPE_ONLY_ARGUMENTS[name] if i < len(node.args)]
        return _nodes(data)
    return list(node.all_input_nodes)


def reads_as_parameter(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` reads ``node`` only for a quantizer's parameters: a scale, a zero point, a table's index."""
    observes = user.op == "call_module" and "tfmq_fx.unit" not in user.meta
    quantizes = _schema_name(user).startswith("quantized_decomposed::")
    return (observes or quantizes) and node is not user.args[0]


def data_dependence(graph_module: fx.GraphModule) -> dict[fx.Node, frozenset[str]]:
    """Map every node to the names of the placeholders that its values depend on.

    Constants (parameters, buffers, ``arange`` …) depend on nothing. One walk in topological order.
    """
    dependence: dict[fx.Node, frozenset[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            dependence[node] = frozenset((str(node.target),))
        else:
            dependence[node] = frozenset().union(*(dependence[n] for n in data_arguments(node)))
    return dependence
