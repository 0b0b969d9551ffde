"""Numbers of each item of a batch, gathered from one table for all that ask."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr
from tfmq_fx.passes.support.predicates import is_call, is_getitem, node_value

__all__ = ["REPEATS", "ItemColumns"]

aten = torch.ops.aten
#: What stands between the rows of the batch and the index of one activation's parameters.
REPEATS = (aten.expand.default, aten.unsqueeze.default, aten.reshape.default)


def _key(index: fx.Node) -> Hashable:
    """The same for indices that are computed alike: every layer has a chain of nodes of its own."""
    if not is_call(index, *REPEATS):
        return index
    sizes: Any = index.args[1]
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes]
    numbers = [str(node_value(size)) if isinstance(size, fx.Node) else str(size) for size in sizes]
    return index.target, _key(argument_node(index, 0)), tuple(numbers)


class ItemColumns:
    """Columns of numbers, each read in the row of its item.

    An engine pays for every operator, however small. So all columns of one index lie in one table, which is gathered
    once and cut into columns once.
    """

    def __init__(self) -> None:
        self._tables: dict[Hashable, tuple[fx.Node, int, list[Tensor]]] = {}
        self._cut: dict[Hashable, fx.Node] = {}

    def add(self, index: fx.Node, column: Tensor, ndim: int) -> tuple[Hashable, int]:
        """Ask for a column.

        Args:
            index: The node with the row of every entry of the first axis, int64 ``[R]``.
            column: float32 ``[G]``.
            ndim: The axes of what it is to be multiplied with.

        Returns:
            What :meth:`read` takes.
        """
        key = _key(index), ndim, len(column)
        columns = self._tables.setdefault(key, (index, ndim, []))[2]
        columns.append(column)
        return key, len(columns) - 1

    def read(self, graph_module: fx.GraphModule, column: tuple[Hashable, int], anchor: fx.Node) -> fx.Node:
        """Insert the column of every entry, ``[R, 1, …]``, at the insertion point; all must have been asked for."""
        key, position = column
        if key not in self._cut:
            self._cut[key] = self._insert(graph_module, key, anchor)
        return insert_call(graph_module.graph, operator.getitem, (self._cut[key], position), anchor=anchor)

    def _insert(self, graph_module: fx.GraphModule, key: Hashable, anchor: fx.Node) -> fx.Node:
        index, ndim, columns = self._tables[key]
        graph, following = graph_module.graph, index.next
        while following.op == "placeholder" or is_getitem(following):
            following = following.next
        name = add_buffer(graph_module, "item_columns", torch.stack(columns, dim=1))
        with graph.inserting_before(following):
            table = insert_get_attr(graph_module, name, anchor=anchor)
            rows = insert_call(graph, aten.index_select.default, (table, 0, index), anchor=anchor)
            if ndim > 2:
                shape = [-1, len(columns), *[1] * (ndim - 2)]
                rows = insert_call(graph, aten.reshape.default, (rows, shape), anchor=anchor)
            return insert_call(graph, aten.split_with_sizes.default, (rows, [1] * len(columns), 1), anchor=anchor)
