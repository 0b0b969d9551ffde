"""The table row of every item of a batch."""

from __future__ import annotations

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.nodes import insert_call
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["rows_of_items"]

aten = torch.ops.aten


def rows_of_items(graph: fx.Graph, row: fx.Node, value: Tensor, *, anchor: fx.Node) -> fx.Node:
    """Insert the row index of every item along axis 0 of ``value``: shape ``[value.shape[0]]``."""
    size = value.shape[0]
    rows = row if node_value(row).ndim == 1 else insert_call(graph, aten.reshape.default, (row, [-1]), anchor=anchor)
    if node_value(rows).shape[0] == size:
        return rows
    return insert_call(graph, aten.expand.default, (rows, [_size_node(graph, size, anchor)]), anchor=anchor)


def _size_node(graph: fx.Graph, size: int | SymInt, anchor: fx.Node) -> int | fx.Node:
    """A symbolic size as a node: read off a placeholder that has it, so it is available everywhere."""
    if isinstance(size, int):
        return size
    for node in graph.nodes:
        if node.op != "placeholder" or not isinstance(node_value(node), Tensor):
            continue
        for axis, candidate in enumerate(node_value(node).shape):
            if isinstance(candidate, SymInt) and candidate.node.expr == size.node.expr:
                return insert_call(graph, aten.sym_size.int, (node, axis), anchor=anchor)
    msg = f"no input has the size {size} that node {anchor.name!r} needs"
    raise PassError(msg)
