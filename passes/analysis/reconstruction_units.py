"""Reconstruction units: the parts of a model whose rounding is learned one after the other.

A unit is a residual block (BRECQ, ICLR 2021, section 3.2: blocks keep the dependence between their layers,
and there is little of it across them), the temporal block (TFMQ-DM, CVPR 2024, section 4: it is a unit of
its own, not a part of the blocks that read it), the layers that depend on the timestep and the conditioning alone,
for the same reason, or a single layer for what lies in neither.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import fx

from tfmq_fx.passes.analysis.conditional_part import outside_block
from tfmq_fx.passes.analysis.dependence import data_dependence
from tfmq_fx.passes.analysis.layer_names import common_path, layer_name
from tfmq_fx.passes.analysis.reachability import Reachability, contracted_order
from tfmq_fx.passes.analysis.residual_joins import Modules, find_regions, is_sum, join_modules
from tfmq_fx.passes.analysis.temporal_block import find_temporal_block
from tfmq_fx.passes.analysis.unit_members import UnitMembers, is_size
from tfmq_fx.passes.support.predicates import is_getitem, is_weighted

__all__ = ["EARLY", "ReconstructionUnit", "find_units"]

Kind = Literal["temporal", "conditional", "residual", "layer"]
#: Those that learn from their own output over the timesteps; they come first, in this order.
EARLY: tuple[Kind, ...] = ("temporal", "conditional")
NAMES: dict[Kind, str] = {"temporal": "temporal block", "conditional": "conditional part"}


@dataclass(frozen=True)
class ReconstructionUnit:
    """A part of a graph to reconstruct at once.

    Attributes:
        name: Dotted path of the module, the layer's name, ``"temporal block"``, ``"conditional part"``, or
            ``"region 3"`` when the graph tells no name. No two units have the same: a second call of a module is
            ``"block (2)"``.
        kind: ``"temporal"``, ``"conditional"``, ``"residual"`` or ``"layer"``.
        nodes: Its nodes in the order of the graph. The set is convex: no path leaves it and comes back.
        weighted: Its weighted ops, at least one.
    """

    name: str
    kind: Kind
    nodes: tuple[fx.Node, ...]
    weighted: tuple[fx.Node, ...]


def find_units(
    graph_module: fx.GraphModule,
    timestep: str = "timestep",
    *,
    granularity: Literal["block", "layer"] = "block",
    temporal: bool = True,
    conditions: Collection[str] = (),
) -> tuple[ReconstructionUnit, ...]:
    """Divide the weighted ops of a graph, prepared or not, into reconstruction units.

    A residual unit is the innermost module whose own ``forward`` adds a branch to what it branched off from.
    Nodes without a module, and those in the ``forward`` of the whole model, are grouped by structure alone:
    a region with one entry that ends in such an addition. Whatever would overlap another unit, or depend on
    one that depends on it, is left as single layers.

    Args:
        graph_module: A captured graph; it is not changed.
        timestep: Name of the timestep input.
        granularity: ``"layer"`` makes each weighted op outside the temporal block a unit of its own.
        temporal: Whether the temporal block is a unit, the first one. Without it each embedding layer belongs
            to the block that reads it, and each linear of the time embedding is a layer (the BRECQ baseline).
        conditions: Names of the inputs that layers of the time path depend on beside the timestep
            (``conditioning_inputs``). With ``temporal``, what is behind them and never behind another unit, is the
            second unit.

    Returns:
        The units in an order in which they can run. Every weighted op is in exactly one.
    """
    return _Search(graph_module, timestep, granularity, temporal, conditions).run()


class _Search:
    """One search, with what it knows about the graph."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        timestep: str,
        granularity: str,
        temporal: bool,
        conditions: Collection[str],
    ) -> None:
        self.reach = Reachability(graph_module.graph)
        self.order = self.reach.order
        self.dependence = data_dependence(graph_module)
        self.modules = Modules(self.order)
        self.block = find_temporal_block(graph_module, timestep)
        self.members = UnitMembers(self.reach, self.dependence, self.block)
        self.granularity, self.timestep = granularity, timestep
        self.early: dict[Kind, set[fx.Node]] = {}
        if temporal:
            self.early["temporal"] = self.members.time_path_unit(set(self.block.nodes), set())
        if temporal and conditions:
            path = find_temporal_block(graph_module, timestep, finite=(*self.block.finite, *conditions))
            self.early["conditional"] = self.members.time_path_unit(
                set(outside_block(path, self.block)), self.early["temporal"] | set(self.block.nodes)
            )
        self.taken = set().union(*self.early.values())
        self.reserved = self.taken | {n for n in self.reach.ancestors(self.taken) if n.op != "placeholder"}
        self.layers = [layer for layer in self.block.embedding_layers if layer.linear not in self.taken]

    def run(self) -> tuple[ReconstructionUnit, ...]:
        refused: set[str] = set()
        while True:
            residual = {} if self.granularity == "layer" else self._residual(refused)
            taken = self.taken.union(*residual.values())
            single = [node for node in self.order if is_weighted(node) and node not in taken]
            groups: list[tuple[str, Kind, set[fx.Node]]] = []
            groups += [(NAMES[kind], kind, nodes) for kind, nodes in self.early.items() if nodes]
            groups += [(key, "residual", nodes) for key, nodes in residual.items()]
            for node in single:
                key = f"%{node.name}"
                groups.append(
                    (key, "layer", {node} if key in refused else self.members.with_private({node}, self.reserved))
                )
            members = [nodes for _, _, nodes in groups]
            items, circular = contracted_order(self.reach, members, early=self.reserved)
            if not circular:
                return self._named(groups, items)
            # Blocks that feed each other: the largest one is given up, and what is left is looked at again.
            cyclic = [groups[position] for position in circular]
            if any(kind == "conditional" for _, kind, _ in cyclic):
                # Its layers go back to the blocks that read them.
                self.taken -= self.early.pop("conditional")
                self.reserved = self.taken | {n for n in self.reach.ancestors(self.taken) if n.op != "placeholder"}
                continue
            refused.add(max((kind == "residual", len(nodes), key) for key, kind, nodes in cyclic)[2])

    def _is_data(self, node: fx.Node) -> bool:
        """Whether ``node`` carries data, and not that of the timestep alone."""
        depends = self.dependence[node]
        own = node not in self.block and node not in self.taken
        return bool(depends) and depends != {self.timestep} and node.op != "output" and own

    # -- residual units ---------------------------------------------------------------------------------------

    def _residual(self, refused: set[str]) -> dict[str, set[fx.Node]]:
        """Residual units by a key: the module call, or the join that ends a region."""
        units: dict[str, set[fx.Node]] = {}
        for call, nodes in self._by_module().items():
            self._add(units, call, nodes, refused)
        structural = [n for n in self.order if self._is_data(n) and is_sum(n) and self.modules.home(n) is None]
        inputs = [str(n.target) for n in self.order if n.op == "placeholder" and n.target != self.timestep]
        for nodes in find_regions(self.reach, self.dependence, inputs, structural, self._is_data):
            join = max(nodes, key=self.reach.index.__getitem__)
            self._add(units, f"%{join.name}", nodes, refused)
        return units

    def _by_module(self) -> dict[str, set[fx.Node]]:
        """The nodes of each module call with a residual join of its own, the innermost calls first."""
        calls = join_modules(self.modules, self.reach, self._is_data)
        groups: dict[str, set[fx.Node]] = {}
        owner: dict[fx.Node, str | None] = {}
        for node in self.order:
            own = next((call for call in reversed(self.modules.stacks[node]) if call in calls), None)
            owner[node] = owner.get(node.all_input_nodes[0]) if is_getitem(node) else own
            outside = node in self.reserved or node in self.block or is_size(node)
            if node.op == "call_function" and not outside and (call := owner[node]):
                groups.setdefault(call, set()).add(node)
        depth = {call: len(self.modules.paths[call].split(".")) for call in groups}
        return {call: groups[call] for call in sorted(groups, key=lambda call: -depth[call])}

    def _add(self, units: dict[str, set[fx.Node]], key: str, nodes: set[fx.Node], refused: set[str]) -> None:
        """Complete a candidate and add it to ``units``, unless it holds no layer or would take what is not its own."""
        weighted = {node for node in nodes if is_weighted(node)}
        taken = self.reserved.union(*units.values())
        if key in refused or not weighted or nodes & taken:
            return
        whole = self.reach.closure(nodes)
        attached = {node for node in self._embedding_layers_of(whole) if node not in taken}
        whole = self.reach.closure(whole | attached)
        enclosed = [node for node in whole - nodes - attached if is_weighted(node)]
        if whole & taken or any(self.modules.stacks[node] or node in self.block for node in enclosed):
            return
        units[key] = self.members.with_private(whole, taken, temporal=bool(attached))

    def _embedding_layers_of(self, whole: set[fx.Node]) -> set[fx.Node]:
        """The embedding layers that nothing but ``whole`` reads, each with the temporal nodes that it leads to."""
        attached: set[fx.Node] = set()
        for layer in self.layers:
            cone, queue, readers = {layer.linear}, [layer.linear], set()
            while queue:
                for user in queue.pop().users:
                    if user not in self.block:
                        readers.add(user)
                    elif user not in cone:
                        cone.add(user)
                        queue.append(user)
            if readers and readers <= whole:
                attached |= cone
        return attached

    # -- names ------------------------------------------------------------------------------------------------

    def _named(
        self, groups: list[tuple[str, Kind, set[fx.Node]]], items: Collection[tuple[fx.Node, ...]]
    ) -> tuple[ReconstructionUnit, ...]:
        by_nodes = {frozenset(nodes): (key, kind) for key, kind, nodes in groups}
        taken: dict[str, int] = {}
        units: list[ReconstructionUnit] = []
        for nodes in items:
            if (group := by_nodes.get(frozenset(nodes))) is None:
                continue
            weighted = tuple(node for node in nodes if is_weighted(node))
            name = self._name(*group, weighted) or f"region {len(units)}"
            count = taken[name] = taken.get(name, 0) + 1
            units.append(ReconstructionUnit(f"{name} ({count})" if count > 1 else name, group[1], nodes, weighted))
        return tuple(sorted(units, key=lambda unit: EARLY.index(unit.kind) if unit.kind in EARLY else len(EARLY)))

    def _name(self, key: str, kind: Kind, weighted: tuple[fx.Node, ...]) -> str:
        if kind in EARLY:
            return key
        if key in self.modules.paths:
            return self.modules.paths[key]
        return common_path(weighted) if kind == "residual" else layer_name(weighted[0])
