"""Which nodes belong to a reconstruction unit beside its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import SymInt, Tensor, fx

from tfmq_fx.passes.analysis.reachability import Reachability
from tfmq_fx.passes.analysis.temporal_block import TemporalBlock
from tfmq_fx.passes.support.predicates import is_weighted, node_value

__all__ = ["UnitMembers", "is_size"]


@dataclass(frozen=True)
class UnitMembers:
    """Completes the nodes of units of one graph.

    Attributes:
        reach: What leads where in the graph.
        dependence: The inputs that the data of each node depends on.
        block: The temporal block.
    """

    reach: Reachability
    dependence: dict[fx.Node, frozenset[str]]
    block: TemporalBlock

    def time_path_unit(self, members: set[fx.Node], before: set[fx.Node]) -> set[fx.Node]:
        """Those of ``members``, computed nodes of the time path, that no layer but ``before`` has to run before.

        A node that reads the *shape* of a feature map depends on the timestep alone, and still has to wait. One of
        the temporal block that reads the shape of something in here (a row for every item, of a 0-dim timestep)
        comes in too.
        """
        included: set[fx.Node] = set()
        late: set[fx.Node] = set()
        for node in self.reach.order:
            is_late = any(source in late for source in self.reach.sources[node])
            follows = any(source in included for source in self.reach.sources[node])
            if node in before and not is_late and not follows:
                continue
            if (node in members or node in before) and not is_late:
                included.add(node)
            elif is_late or is_weighted(node) or follows:
                late.add(node)
        for node in reversed(self.reach.order):
            if node in included and not self.dependence[node] and not all(user in included for user in node.users):
                included.discard(node)
        return included if any(is_weighted(node) for node in included) else set()

    def with_private(
        self, nodes: Iterable[fx.Node], excluded: Collection[fx.Node], *, temporal: bool = False
    ) -> set[fx.Node]:
        """Add what only ``nodes`` read: constants, observers, with ``temporal`` also what an embedding layer reads.

        Nodes of ``excluded`` are never added.
        """
        members = set(nodes)
        queue = list(members)
        while queue:
            for source in queue.pop().all_input_nodes:
                if source in members or source in excluded:
                    continue
                if not all(user in members for user in source.users):
                    continue
                inner = temporal and source in self.block and source.op == "call_function" and not is_weighted(source)
                if inner or _is_observer(source) or self._is_constant(source):
                    members.add(source)
                    queue.append(source)
        return members

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether ``node`` is read from the state, or computed from such and from sizes alone."""
        if node.op == "get_attr":
            return True
        if node.op != "call_function" or self.dependence[node] or is_size(node) or is_weighted(node):
            return False
        return all(is_size(source) or self._is_constant(source) for source in node.all_input_nodes)


def _is_observer(node: fx.Node) -> bool:
    return node.op == "call_module" and "tfmq_fx.unit" not in node.meta


def is_size(node: fx.Node) -> bool:
    """Whether ``node`` yields a size: it is recomputed where it is needed, so it belongs nowhere."""
    value = node_value(node)
    return not isinstance(value, Tensor) and isinstance(value, (int, SymInt))
