"""Reachability in a graph, and the order of its parts when groups of nodes are drawn together into one."""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import fx

from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.support.predicates import is_call, is_idle_dropout, writes_in_place

__all__ = ["Reachability", "contracted_order"]


class Reachability:
    """Which nodes of one graph lead to which, as sets of bits; a snapshot, it does not follow later edits.

    Writes in place and random draws count as dependences too: what reads a value before it is overwritten
    comes before the write, what reads it afterwards comes after.

    Attributes:
        order: The nodes in topological order; a bit of a mask is a position in it.
        index: The position of each node.
        sources: What each node waits for: its arguments, and what has to have happened before.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = list(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.order)}
        self.sources = {node: set(node.all_input_nodes) for node in self.order}
        for earlier, later in _sequenced(self.order):
            self.sources[later].add(earlier)
        self._before: list[int] = []
        for node in self.order:
            mask = 0
            for source in self.sources[node]:
                position = self.index[source]
                mask |= self._before[position] | 1 << position
            self._before.append(mask)
        self._after = [0] * len(self.order)
        for position in range(len(self.order) - 1, -1, -1):
            reached = self._after[position] | 1 << position
            for source in self.sources[self.order[position]]:
                self._after[self.index[source]] |= reached

    def reaches(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether a path leads from ``node`` to ``other``."""
        return bool(self._after[self.index[node]] >> self.index[other] & 1)

    def ancestors(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes that lead to one of ``nodes``."""
        return self._nodes(self._union(self._before, nodes))

    def closure(self, nodes: Collection[fx.Node]) -> set[fx.Node]:
        """``nodes`` and every node on a path between two of them: the smallest convex set that holds them."""
        return self._nodes(self._union(self._before, nodes) & self._union(self._after, nodes)) | set(nodes)

    def _union(self, masks: Sequence[int], nodes: Iterable[fx.Node]) -> int:
        union = 0
        for node in nodes:
            union |= masks[self.index[node]]
        return union

    def _nodes(self, mask: int) -> set[fx.Node]:
        nodes = set()
        while mask:
            lowest = mask & -mask
            nodes.add(self.order[lowest.bit_length() - 1])
            mask ^= lowest
        return nodes


def contracted_order(
    reachability: Reachability, groups: Sequence[Collection[fx.Node]], *, early: Collection[fx.Node] = ()
) -> tuple[list[tuple[fx.Node, ...]], set[int]]:
    """Order the graph with each group drawn together into one item.

    Args:
        reachability: The graph.
        groups: Disjoint sets of nodes.
        early: Nodes whose items are to come as soon as what they wait for is there.

    Returns:
        The items in a topological order that stays close to the graph's own, each with its nodes in the order
        of the graph, and the positions in ``groups`` of those groups that depend on each other in a circle.
        With such groups the list is not complete.
    """
    owner = {node: position for position, group in enumerate(groups) for node in group}
    items: dict[int | fx.Node, list[fx.Node]] = {}
    for node in reachability.order:
        items.setdefault(owner.get(node, node), []).append(node)
    predecessors: dict[int | fx.Node, set[int | fx.Node]] = {item: set() for item in items}
    successors: dict[int | fx.Node, set[int | fx.Node]] = {item: set() for item in items}
    for node in reachability.order:
        for source in reachability.sources[node]:
            target, origin = owner.get(node, node), owner.get(source, source)
            if target != origin:
                predecessors[target].add(origin)
                successors[origin].add(target)
    # Inputs keep their places: their order is the calling convention.
    priority = {owner.get(node, node): 1 for node in early}
    priority |= {node: 0 for node in reachability.order if node.op == "placeholder"}
    rank = {item: (priority.get(item, 2), reachability.index[nodes[-1]]) for item, nodes in items.items()}
    ordered = [tuple(items[item]) for item in _remove_ready(predecessors, successors, rank)]
    blocked = {item for item in items if predecessors[item]}
    # What merely follows a circle waits in vain too; taken away from the other end, the circles are left.
    reverse = {item: successors[item] & blocked for item in blocked}
    _remove_ready(reverse, {item: predecessors[item] & blocked for item in blocked}, rank)
    return ordered, {item for item in blocked if reverse[item] and isinstance(item, int)}


def _remove_ready(
    predecessors: dict[int | fx.Node, set[int | fx.Node]],
    successors: dict[int | fx.Node, set[int | fx.Node]],
    rank: dict[int | fx.Node, tuple[int, int]],
) -> list[int | fx.Node]:
    """Take away, lowest rank first, what waits for nothing any more; empties the entries of ``predecessors``."""
    ready = [(rank[item], item) for item, sources in predecessors.items() if not sources]
    heapq.heapify(ready)
    removed = []
    while ready:
        _, item = heapq.heappop(ready)
        removed.append(item)
        for follower in successors[item]:
            predecessors[follower].discard(item)
            if not predecessors[follower]:
                heapq.heappush(ready, (rank[follower], follower))
    return removed


# -- what has to stay in order though no value passes ------------------------------------------------------------


def _sequenced(order: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of nodes whose order matters beside their arguments: around writes in place, and of random draws."""
    pairs: list[tuple[fx.Node, fx.Node]] = []
    draws = [node for node in order if _draws(node)]
    pairs += itertools.pairwise(draws)
    if not any(writes_in_place(node) for node in order):
        return pairs
    storage = _storages(order)
    accesses: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        for root in {storage[source] for source in (node, *node.all_input_nodes)}:
            accesses.setdefault(root, []).append(node)
    for nodes in accesses.values():
        if any(writes_in_place(node) for node in nodes):
            pairs += itertools.pairwise(nodes)
    return pairs


def _draws(node: fx.Node) -> bool:
    target = node.target
    random = isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return random and not is_idle_dropout(node)


def _storages(order: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Map each node to one node that stands for the memory that it may share."""
    storage: dict[fx.Node, fx.Node] = {}
    shared: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        storage[node], shared[node] = node, [node]
        if not _may_alias(node):
            continue
        for source in node.all_input_nodes:
            old, new = storage[source], storage[node]
            if old is not new:
                for member in shared.pop(new):
                    storage[member] = old
                    shared[old].append(member)
    return storage


def _may_alias(node: fx.Node) -> bool:
    """Whether the result may be a view of an argument: by schema, or because nothing is known of the call."""
    if isinstance(node.target, OpOverload):
        return any(value.alias_info is not None for value in schema_of(node.target).returns)
    return node.op == "call_module" or is_call(node, operator.getitem)
