"""Compute the table row of the timestep once per forward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from .base import GraphPass, PassError
from .nodes import add_buffer, insert_call, insert_get_attr
from .predicates import is_call, node_value
from .timestep_row import timestep_row

__all__ = ["IndexTimesteps", "distinct_timesteps", "find_row", "row_values"]

ROW_OP = torch.ops.tfmq_fx.timestep_row.default
assert timestep_row is not None  # importing the module registers the operator


def find_row(graph_module: fx.GraphModule) -> fx.Node | None:
    """The node that computes the table row, or None."""
    return next((node for node in graph_module.graph.nodes if is_call(node, ROW_OP)), None)


def row_values(graph_module: fx.GraphModule, row: fx.Node) -> Tensor:
    """The timestep values behind the row node, shape ``[K]``."""
    values = getattr(graph_module, str(row.args[1].target))  # type: ignore[union-attr]
    assert isinstance(values, Tensor)
    return values


def distinct_timesteps(values: Any) -> Tensor:
    """The values of a schedule in their order, repeated ones once; float64 ``[K]``."""
    flat = [float(value) for value in torch.as_tensor(values).reshape(-1).tolist()]
    return torch.tensor(list(dict.fromkeys(flat)), dtype=torch.float64)


class IndexTimesteps(GraphPass):
    """Insert ``row = timestep_row(timestep, values)`` behind the placeholders.

    Before::

        %timestep = placeholder

    After::

        %timestep = placeholder
        %values = get_attr[timestep_values]      %row = timestep_row(%timestep, %values, "error")

    Legality: nothing that was there reads the row, so numerics are preserved; a graph that has a row
    already is left alone. The lookup is by value, never by a step counter.
    Meta: the new nodes have no module, as the timestep itself has none.

    Args:
        values: The timesteps of the table in their order; repeated ones are kept once.
        timestep: Name of the timestep placeholder.
        unknown: What a timestep outside the table does: ``"error"`` names it, ``"nearest"`` takes the
            closest row.
    """

    id: ClassVar[str] = "tfmq::index_timesteps"

    def __init__(self, values: Any, *, timestep: str = "timestep", unknown: str = "error") -> None:
        super().__init__()
        if unknown not in ("error", "nearest"):
            msg = (
                f"{self.id}: unknown={unknown!r} is no policy for timesteps outside the table; use 'error' or 'nearest'"
            )
            raise ValueError(msg)
        self.values = distinct_timesteps(values)
        self.timestep, self.unknown = timestep, unknown

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The timestep placeholder, and at least one value."""
        super().requires(graph_module)
        inputs = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
        if self.timestep not in inputs:
            msg = f"{self.id}: no input named {self.timestep!r}; the inputs are {', '.join(inputs)}"
            raise PassError(msg)
        if not isinstance(node_value(inputs[self.timestep]), Tensor):
            msg = f"{self.id}: input {self.timestep!r} is not a tensor; capture the model with a tensor timestep"
            raise PassError(msg)
        if len(self.values) == 0:
            msg = f"{self.id}: the table of timesteps is empty; pass scheduler.timesteps"
            raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the row behind the last placeholder."""
        if find_row(graph_module) is not None:
            return False
        graph = graph_module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        timestep = next(node for node in placeholders if node.target == self.timestep)
        name = add_buffer(graph_module, "timestep_values", self.values)
        with graph.inserting_before(placeholders[-1].next):
            values = insert_get_attr(graph_module, name, anchor=timestep)
            insert_call(graph, ROW_OP, (timestep, values, self.unknown), anchor=timestep)
        return True
