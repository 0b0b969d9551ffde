"""Cut the timesteps of the table into groups and look a batch's groups up once per forward."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.analysis.table_row import row_lookups, row_values
from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["EACH_TIMESTEP", "GROUPS", "GROUPS_INPUT", "GroupTimesteps", "find_groups", "group_numbers"]

aten = torch.ops.aten

#: Name of the buffer with the group of each table row.
GROUPS = "timestep_groups"
#: The same where every timestep is a group of its own, whatever else is grouped: for layers that see timesteps and
#: conditioning, whose parameters are the timesteps' (:class:`~.observe_timestep_groups.ObserveTimestepGroups`).
EACH_TIMESTEP = "timestep_numbers"
#: ``meta`` key of an input that the groups come in by, where the temporal block is a program of its own: the name that
#: their buffer had.
GROUPS_INPUT = "tfmq_fx.groups_input"


def group_numbers(values: Tensor, groups: int) -> Tensor:
    """The group of each timestep: contiguous in the order of the values, as equal in size as can be.

    Args:
        values: Distinct timesteps, ``[K]``, in any order.
        groups: Number of groups; with ``K`` or more each timestep is a group of its own.

    Returns:
        int64 ``[K]``, in ``[0, min(groups, K))``: 0 has the smallest timesteps, the least noise.
    """
    rank = torch.argsort(torch.argsort(values))
    return rank * min(groups, len(values)) // len(values)


def find_groups(graph_module: fx.GraphModule, name: str = GROUPS) -> fx.Node | None:
    """The node with the group of each item of the batch, int64 ``[N]`` (``[1]`` for a 0-dim timestep), or None.

    Args:
        graph_module: A graph.
        name: The buffer that the groups are read from: :data:`GROUPS` or :data:`EACH_TIMESTEP`. Where the temporal
            block is a program of its own, they are an input instead.
    """
    return next((node for node in graph_module.graph.nodes if _is_groups(node, name)), None)


def _is_groups(node: fx.Node, name: str) -> bool:
    if node.op == "placeholder":
        return node.meta.get(GROUPS_INPUT) == name
    table = node.args[0] if is_call(node, aten.index_select.default) else None
    return isinstance(table, fx.Node) and table.op == "get_attr" and table.target == name


class GroupTimesteps(GraphPass):
    """Insert ``groups = index_select(timestep_groups, 0, row)`` behind the table row.

    Before::

        %row = timestep_row(%timestep, %values, "error")

    After::

        %row = timestep_row(%timestep, %values, "error")
        %table = get_attr[timestep_groups]      %groups = index_select(%table, 0, %row)

    Legality: nothing that was there reads the groups, so numerics are preserved; a graph that has them already is
    left alone. The lookup is by value, never by a step counter. Source: timestep-grouped activation quantization,
    ADP-DM (arXiv 2305.18723); a parameter set per timestep, TDQ (NeurIPS 2023), is the limit of groups of one.
    Meta: the new nodes have no module, as the timestep itself has none.

    Args:
        groups: Number of groups.
        name: The buffer for them; a graph may have groups under both names.
    """

    id: ClassVar[str] = "tfmq::group_timesteps"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(self, groups: int, name: str = GROUPS) -> None:
        super().__init__()
        if groups < 1:
            msg = f"{self.id}: groups={groups!r} must be at least 1"
            raise ValueError(msg)
        self.groups, self.name = groups, name

    def requires(self, graph_module: fx.GraphModule) -> None:
        """A row of the timestep table."""
        super().requires(graph_module)
        if not row_lookups(graph_module):
            msg = f"{self.id}: the graph has no timestep row; run IndexTimesteps first"
            raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Insert the lookup behind the row."""
        if find_groups(graph_module, self.name) is not None:
            return False
        row = row_lookups(graph_module)[0]
        graph = graph_module.graph
        name = add_buffer(graph_module, self.name, group_numbers(row_values(graph_module, row), self.groups))
        with graph.inserting_before(row.next):
            table = insert_get_attr(graph_module, name, anchor=row)
            rows = row
            if node_value(row).ndim != 1:
                rows = insert_call(graph, aten.reshape.default, (row, [-1]), anchor=row)
            insert_call(graph, aten.index_select.default, (table, 0, rows), anchor=row)
        return True
