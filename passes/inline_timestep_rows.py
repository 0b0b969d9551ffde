"""Write the timestep lookup out in ATen operators, for backends that cannot call a Python operator."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from .analysis.table_row import row_columns
from .base import GraphPass
from .nodes import insert_call, replace_node
from .predicates import is_call
from .timestep_row import ROW_OP, TOLERANCE

__all__ = ["InlineTimestepRows"]

aten = torch.ops.aten


class InlineTimestepRows(GraphPass):
    """Replace ``timestep_row`` by a search for the nearest value.

    Before::

        %row = timestep_row(%timestep, %values, "error")

    After::

        %d = abs(sub(unsqueeze(to(%timestep, float64), -1), %values))
        %row = where(le(amin(%d), tolerance), argmin(%d), K)                  # K: behind the last row

    Legality: the same row for every timestep of the table. A timestep outside it cannot be named by
    compiled code: under ``"error"`` its row is ``K``, which the bounds check of the gather refuses (the
    denoiser names it before it gets that far); under ``"nearest"`` the closest row is taken, as before.
    Numerics are preserved to the bit.
    Meta: the new nodes take the module stack of the lookup.
    """

    id: ClassVar[str] = "tfmq::inline_timestep_rows"

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every lookup."""
        graph = graph_module.graph
        lookups = [node for node in graph.nodes if is_call(node, ROW_OP)]
        # The rows of all inputs together: as the row of one of them, it leads behind the last whatever the others are.
        count = max((len(column) for column in row_columns(graph_module).values()), default=0)
        for node in lookups:
            timestep, values, unknown = node.args[:3]
            with graph.inserting_before(node):
                wide = insert_call(graph, aten.to.dtype, (timestep, torch.float64), anchor=node)
                column = insert_call(graph, aten.unsqueeze.default, (wide, -1), anchor=node)
                gap = insert_call(graph, aten.sub.Tensor, (column, values), anchor=node)
                distance = insert_call(graph, aten.abs.default, (gap,), anchor=node)
                row = insert_call(graph, aten.argmin.default, (distance, -1), anchor=node)
                if unknown == "error":
                    nearest = insert_call(graph, aten.amin.default, (distance, [-1]), anchor=node)
                    size = insert_call(graph, aten.abs.default, (wide,), anchor=node)
                    slack = insert_call(graph, aten.clamp_min.default, (size, 1.0), anchor=node)
                    # Twice the tolerance: it is relative to the timestep here, to the table's value there.
                    allowed = insert_call(graph, aten.mul.Tensor, (slack, 2 * TOLERANCE), anchor=node)
                    known = insert_call(graph, aten.le.Tensor, (nearest, allowed), anchor=node)
                    row = insert_call(graph, aten.where.ScalarOther, (known, row, count), anchor=node)
            replace_node(node, row)
        return bool(lookups)
