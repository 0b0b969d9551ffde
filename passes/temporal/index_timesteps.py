"""Compute the table row of the timestep once per forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.analysis.table_row import find_row
from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.timestep_row import ROW_OP
from tfmq_fx.passes.support.timestep_values import distinct_timesteps

__all__ = ["IndexTimesteps", "distinct_timesteps"]

aten = torch.ops.aten


class IndexTimesteps(GraphPass):
    """Insert ``row = timestep_row(timestep, values)`` behind the placeholders.

    Before::

        %timestep = placeholder

    After::

        %timestep = placeholder
        %values = get_attr[timestep_values]      %row = timestep_row(%timestep, %values, "error")

    With further finite inputs every combination has a row, the timestep's changing slowest::

        %t = timestep_row(%timestep, %values, "error")
        %c = timestep_row(%class_labels, %labels, "error", "class_labels")      %row = add(mul(%t, 10), %c)

    Legality: nothing that was there reads the row, so numerics are preserved; a graph that has a row
    already is left alone. The lookup is by value, never by a step counter.
    Meta: the new nodes have no module, as the timestep itself has none.

    Args:
        values: The timesteps of the table in their order; repeated ones are kept once.
        timestep: Name of the timestep placeholder.
        unknown: What a timestep outside the table does: ``"error"`` names it, ``"nearest"`` takes the
            closest row. Another input outside its values is always an error.
        finite: By name, the values of further inputs.
    """

    id: ClassVar[str] = "tfmq::index_timesteps"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(
        self,
        values: Any,
        *,
        timestep: str = "timestep",
        unknown: str = "error",
        finite: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if unknown not in ("error", "nearest"):
            msg = (
                f"{self.id}: unknown={unknown!r} is no policy for timesteps outside the table; use 'error' or 'nearest'"
            )
            raise ValueError(msg)
        self.values = distinct_timesteps(values)
        self.timestep, self.unknown = timestep, unknown
        self.finite = {name: distinct_timesteps(allowed) for name, allowed in (finite or {}).items()}

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The timestep placeholder, and at least one value."""
        super().requires(graph_module)
        inputs = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
        for name in (self.timestep, *self.finite):
            if name not in inputs:
                msg = f"{self.id}: no input named {name!r}; the inputs are {', '.join(inputs)}"
                raise PassError(msg)
            if not isinstance(node_value(inputs[name]), Tensor):
                msg = f"{self.id}: input {name!r} is not a tensor; capture the model with a tensor {name}"
                raise PassError(msg)
            if node_value(inputs[name]).ndim > 1:
                msg = f"{self.id}: input {name!r} has several values per item; capture the model with one per item"
                raise PassError(msg)
        if len(self.values) == 0:
            msg = f"{self.id}: the table of timesteps is empty; pass scheduler.timesteps"
            raise PassError(msg)
        if empty := [name for name, allowed in self.finite.items() if len(allowed) == 0]:
            msg = f"{self.id}: finite input {empty[0]!r} has no values; name at least one"
            raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the row behind the last placeholder."""
        if find_row(graph_module) is not None:
            return False
        graph = graph_module.graph
        placeholders = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
        timestep = placeholders[self.timestep]
        with graph.inserting_before(next(reversed(placeholders.values())).next):
            name = add_buffer(graph_module, "timestep_values", self.values)
            values = insert_get_attr(graph_module, name, anchor=timestep)
            row = insert_call(graph, ROW_OP, (timestep, values, self.unknown), anchor=timestep)
            for name, allowed in self.finite.items():
                table = insert_get_attr(
                    graph_module, add_buffer(graph_module, f"{name}_values", allowed), anchor=timestep
                )
                lookup = insert_call(graph, ROW_OP, (placeholders[name], table, "error", name), anchor=timestep)
                first = insert_call(graph, aten.mul.Tensor, (row, len(allowed)), anchor=timestep)
                row = insert_call(graph, aten.add.Tensor, (first, lookup), anchor=timestep)
        return True
