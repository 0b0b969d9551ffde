"""Move each reconstruction unit into a submodule of its own."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from torch import fx

from tfmq_fx.passes.analysis.reachability import Reachability, contracted_order
from tfmq_fx.passes.analysis.reconstruction_units import EARLY, ReconstructionUnit, find_units
from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.nodes import inherit, insert_call
from tfmq_fx.passes.support.subgraphs import extract_subgraph, known_value

__all__ = ["UNIT", "PartitionUnits"]

#: ``meta`` key of a call of a unit: its name and its kind.
UNIT = "tfmq_fx.unit"


class PartitionUnits(GraphPass):
    """Move each reconstruction unit into a submodule that is called by one node.

    Before::

        %h = group_norm(%x, …)      %c = conv2d(%h, %w, %b)      %y = add(%x, %c)      return cat([%y, %c])

    After::

        %u = unit_3(%x)      %y = getitem(%u, 0)      %c = getitem(%u, 1)      return cat([%y, %c])

    Legality: units are convex and do not depend on each other in a circle (``find_units`` sees to it, with
    writes in place and random draws counted), so the graph has an order in which each stands together.
    Nodes are only moved: numerics are preserved to the bit. A unit shares parameters, buffers and observers
    with the outer module under the same names; training one trains the other. (``Module.to`` replaces
    buffers one by one; move the model before it is partitioned.) A symbolic size is read off the unit's own
    inputs where one of them has it, so that a unit can be run alone on a batch of any size.
    Meta: the nodes inside keep theirs. The call and what picks its outputs have the value, module stack and
    origin of the nodes that they stand for; the call says ``meta["tfmq_fx.unit"] = (name, kind)``.

    ``JoinUnits`` undoes it.

    Args:
        timestep: Name of the timestep input.
        granularity: ``"block"``, or ``"layer"`` for one unit per weighted op.
        temporal: Whether the temporal block is a unit of its own.
        conditions: Names of the inputs behind which the layers of the timestep and the conditioning are another.
    """

    id: ClassVar[str] = "tfmq::partition_units"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(
        self,
        timestep: str = "timestep",
        *,
        granularity: Literal["block", "layer"] = "block",
        temporal: bool = True,
        conditions: Collection[str] = (),
    ) -> None:
        super().__init__()
        if granularity not in ("block", "layer"):
            msg = f"{self.id}: granularity is {granularity!r}; it must be 'block' or 'layer'"
            raise ValueError(msg)
        self.timestep, self.temporal, self.conditions = timestep, temporal, conditions
        self.granularity: Literal["block", "layer"] = granularity

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Bring each unit's nodes together, then move them out."""
        units = find_units(
            graph_module,
            self.timestep,
            granularity=self.granularity,
            temporal=self.temporal,
            conditions=self.conditions,
        )
        if units:
            _make_contiguous(graph_module.graph, units)
        for unit in units:
            _extract_unit(graph_module, unit)
        return bool(units)


def _make_contiguous(graph: fx.Graph, units: Sequence[ReconstructionUnit]) -> None:
    reachability = Reachability(graph)
    first = {node for unit in units if unit.kind in EARLY for node in unit.nodes}
    early = reachability.ancestors(first) | first
    items, circular = contracted_order(reachability, [unit.nodes for unit in units], early=early)
    if circular:
        named = units[min(circular)]
        msg = (
            f"{PartitionUnits.id}: unit {named.name!r} with node {named.nodes[0].name!r} needs a unit that needs it in "
            "turn, so they cannot run one after the other; use granularity='layer'"
        )
        raise PassError(msg)
    output = graph.output_node()
    for node in (node for item in items for node in item if node is not output):
        output.prepend(node)


def _extract_unit(graph_module: fx.GraphModule, unit: ReconstructionUnit) -> None:
    graph = graph_module.graph
    members = set(unit.nodes)
    # What nobody reads has an output too: whoever runs a unit wants to see what it computes.
    outputs = [n for n in unit.nodes if any(user not in members for user in n.users)] or [unit.nodes[-1]]
    submodule, inputs = extract_subgraph(graph_module, unit.nodes, outputs)
    name = _free_name(graph_module)
    graph_module.add_submodule(name, submodule)
    with graph.inserting_after(unit.nodes[-1]):
        call = graph.call_module(name, tuple(inputs))
    values = tuple(known_value(graph_module, output) for output in outputs)
    inherit(call, outputs[-1])
    call.meta |= {"val": values[0] if len(values) == 1 else values, UNIT: (unit.name, unit.kind)}
    results = [call]
    if len(outputs) > 1:
        with graph.inserting_before(call.next):
            picks = enumerate(outputs)
            results = [insert_call(graph, operator.getitem, (call, i), anchor=output) for i, output in picks]
    for output, result in zip(outputs, results, strict=True):
        output.replace_all_uses_with(result, delete_user_cb=lambda user: user not in members)
    for node in reversed(unit.nodes):
        graph.erase_node(node)


def _free_name(graph_module: fx.GraphModule) -> str:
    count = 0
    while hasattr(graph_module, f"unit_{count}"):
        count += 1
    return f"unit_{count}"
