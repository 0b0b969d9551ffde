"""Choose what the timestep lookup does with a timestep outside the table."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.predicates import is_call
from tfmq_fx.passes.support.timestep_row import ROW_OP

__all__ = ["SetUnknownTimesteps"]


class SetUnknownTimesteps(GraphPass):
    """Set the policy of the timestep's lookup.

    Before::

        %row = timestep_row(%timestep, %values, "error")

    After::

        %row = timestep_row(%timestep, %values, "nearest")

    Legality: a timestep of the table has the row that it had. One outside it is refused, or takes the nearest row, as
    the user chose; lookups of other inputs stay as they are, for no label is near another.
    Meta: that of the lookup; its value is the same.

    Args:
        unknown: ``"error"`` or ``"nearest"``.
        timestep: Name of the timestep placeholder.
    """

    id: ClassVar[str] = "tfmq::set_unknown_timesteps"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(self, unknown: str, *, timestep: str = "timestep") -> None:
        super().__init__()
        if unknown not in ("error", "nearest"):
            msg = f"{self.id}: unknown={unknown!r} is not supported; use 'error' or 'nearest'"
            raise ValueError(msg)
        self.unknown, self.timestep = unknown, timestep

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Set the third argument."""
        modified = False
        for node in graph_module.graph.nodes:
            if (
                is_call(node, ROW_OP)
                and argument_node(node, 0).target == self.timestep
                and node.args[2] != self.unknown
            ):
                node.update_arg(2, self.unknown)
                modified = True
        return modified
