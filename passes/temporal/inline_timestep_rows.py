"""Write the timestep lookup out in ATen operators, for backends that cannot call a Python operator."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx.passes.analysis.table_row import row_columns, row_values
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.timestep_row import ROW_OP
from tfmq_fx.passes.support.timestep_values import LARGEST, ValueSearch

__all__ = ["InlineTimestepRows"]

aten = torch.ops.aten


class InlineTimestepRows(GraphPass):
    """Replace ``timestep_row`` by the operators of :class:`~.timestep_values.ValueSearch`.

    Before::

        %row = timestep_row(%timestep, %values, "error")

    After::

        %d = abs(sub(unsqueeze(to(%timestep, float64), -1), %values))
        %row = amin(where(le(%d, %tolerances), %numbers, K), -1)              # K: behind the last row
        # "nearest": le(%d, clamp(amin(%d, -1, True), None, LARGEST)) instead

    Legality: the same operators on the same numbers, so the same row for every timestep that has one. One that has none
    cannot be named by compiled code: its row is ``K``, which the bounds check of the gather refuses (the denoiser names
    it before it gets that far). Numerics are preserved to the bit.
    Meta: the new nodes take the module stack of the lookup.
    """

    id: ClassVar[str] = "tfmq::inline_timestep_rows"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every lookup."""
        lookups = [node for node in graph_module.graph.nodes if is_call(node, ROW_OP)]
        # The rows of all inputs together: as the row of one of them, it leads behind the last whatever the others are.
        count = max((len(column) for column in row_columns(graph_module).values()), default=0)
        for node in lookups:
            with graph_module.graph.inserting_before(node):
                row = _search(graph_module, node, count)
            replace_node(node, row)
        return bool(lookups)


def _search(graph_module: fx.GraphModule, lookup: fx.Node, count: int) -> fx.Node:
    """Insert the search of a lookup; what has no row gets ``count``."""

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph_module.graph, target, args, anchor=lookup)

    def constant(name: str, value: torch.Tensor) -> fx.Node:
        return insert_get_attr(graph_module, add_buffer(graph_module, name, value), anchor=lookup)

    timestep, values, unknown = argument_node(lookup, 0), *lookup.args[1:3]
    table = row_values(graph_module, lookup)
    seen, tolerances = ValueSearch(table).seen(node_value(timestep).dtype)
    if not torch.equal(seen, table):
        values = constant("timestep_values_seen", seen)
    wide = call(aten.to.dtype, timestep, torch.float64)
    distance = call(aten.abs.default, call(aten.sub.Tensor, call(aten.unsqueeze.default, wide, -1), values))
    if unknown == "error":
        bound = constant("timestep_tolerances", tolerances)
    else:
        bound = call(aten.clamp.default, call(aten.amin.default, distance, [-1], True), None, LARGEST)
    numbers = constant("timestep_numbers_of_rows", torch.arange(len(table), device=table.device))
    matching_rows = call(aten.where.ScalarOther, call(aten.le.Tensor, distance, bound), numbers, count)
    return call(aten.amin.default, matching_rows, [-1])
