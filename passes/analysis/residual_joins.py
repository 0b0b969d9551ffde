"""Residual joins: additions that bring a branch back to what it branched off from.

Two ways to find them. With a module stack: an addition written in a module's own ``forward`` whose
operands come from one value inside that module. Without: an addition whose operands have a common
dominator such that nothing between the two is read elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, fx

from tfmq_fx.passes.analysis.dependence import data_arguments
from tfmq_fx.passes.analysis.layer_names import seen_through_observers
from tfmq_fx.passes.analysis.reachability import Reachability
from tfmq_fx.passes.support.predicates import is_call, is_conv, is_weighted, node_value

__all__ = ["Modules", "find_regions", "is_sum", "is_sum_of_parts", "join_modules"]

aten = torch.ops.aten

#: Stack entries that name no module.
PLACELESS = "_empty_nn_module_stack_from_metadata_hook"


def is_sum(node: fx.Node) -> TypeGuard[fx.Node]:
    """Whether ``node`` adds two different computed tensors of one shape."""
    if not is_call(node, aten.add.Tensor, aten.add_.Tensor) or len(node.all_input_nodes) != 2:
        return False
    values = [node_value(operand) if isinstance(operand, fx.Node) else None for operand in node.args[:2]]
    shapes = [[str(size) for size in value.shape] for value in values if isinstance(value, Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def _part(node: object) -> tuple[object, ...] | None:
    """What convolutions need in common to be one convolution of a concatenation."""
    if not is_conv(node):
        return None
    weight = node.args[1]
    value = node_value(seen_through_observers(weight)) if isinstance(weight, fx.Node) else None
    kernel = tuple(value.shape[2:]) if isinstance(value, Tensor) else None
    return (node.target, kernel, str(node.args[3:]), str({k: v for k, v in node.kwargs.items() if k != "bias"}))


def is_sum_of_parts(node: fx.Node, reachability: Reachability) -> bool:
    """Whether ``node`` sums convolutions that are one convolution of a concatenation, taken apart.

    They have kernel size and options in common, all but the first are without bias, and none leads to another.
    Such a sum joins no branch: it is what ``SplitConcatenatedConvs`` makes of a single layer.
    """
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    if reachability.reaches(first, second) or reachability.reaches(second, first):
        return False
    while is_sum(first) and isinstance(first.args[1], fx.Node) and _part(first.args[1]) == _part(second):
        first = first.args[0]
        if not isinstance(first, fx.Node):
            return False
    bias = second.args[2] if len(second.args) > 2 else second.kwargs.get("bias")
    return _part(second) is not None and _part(first) == _part(second) and bias is None


class Modules:
    """The modules that the nodes of a graph came from, each call of a module apart."""

    def __init__(self, order: Sequence[fx.Node]) -> None:
        self.stacks = {node: self._stack(node) for node in order}
        self.paths = {call: path for stack in self.stacks.values() for call, path in stack.items()}
        self.weighted = {call for node in order if is_weighted(node) for call in self.stacks[node]}

    @staticmethod
    def _stack(node: fx.Node) -> dict[str, str]:
        stack = node.meta.get("nn_module_stack") or {}
        entries = {str(call): str(entry[0]) for call, entry in stack.items()}
        return {call: path for call, path in entries.items() if path and path != PLACELESS}

    def home(self, node: fx.Node) -> str | None:
        """The innermost module call around ``node`` that holds a weight; the whole model is none."""
        return next((call for call in reversed(self.stacks[node]) if call in self.weighted), None)

    def sources(self, node: fx.Node, call: str, counts: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """``node`` and what its value is computed from inside ``call``, up to the values that enter there."""
        reached: set[fx.Node] = set()
        queue = [node]
        while queue:
            current = queue.pop()
            if current in reached or not counts(current):
                continue
            reached.add(current)
            # A shortcut reads the parts of a concatenation when the rest of the block reads the whole of it.
            passes = current.op == "call_module" or is_call(current, aten.cat.default)
            if call in self.stacks[current] or passes:
                queue.extend(data_arguments(current))
        return reached


def join_modules(modules: Modules, reachability: Reachability, counts: Callable[[fx.Node], bool]) -> set[str]:
    """The module calls that directly contain a residual join.

    Args:
        modules: Where the nodes come from.
        reachability: The graph.
        counts: Whether a node counts as a source of a branch: computed, and not from the timestep alone.
    """
    calls: set[str] = set()
    for node in reachability.order:
        call = modules.home(node)
        if call is None or call in calls or not counts(node) or not is_sum(node):
            continue
        if is_sum_of_parts(node, reachability):
            continue
        first, second = (modules.sources(operand, call, counts) for operand in node.all_input_nodes)
        if first & second:
            calls.add(call)
    return calls


# -- by structure alone --------------------------------------------------------------------------------------------


def find_regions(
    reachability: Reachability,
    dependence: dict[fx.Node, frozenset[str]],
    inputs: Collection[str],
    joins: Collection[fx.Node],
    counts: Callable[[fx.Node], bool],
) -> list[set[fx.Node]]:
    """The single-entry single-exit regions that end in one of ``joins``, innermost first.

    A region is what lies between the nearest common dominator of both operands and the join. What enters it
    from the side (time features, a prompt, constants, shapes) does not depend on the input that the region is
    entered by. A region whose inner values are read elsewhere is none.
    """
    regions: list[set[fx.Node]] = []
    for name in inputs:
        through = [node for node in reachability.order if name in dependence[node] and counts(node)]
        dominator = _dominators(through)
        for join in joins:
            operands = [node for node in join.all_input_nodes if node in dominator]
            if len(operands) != 2 or is_sum_of_parts(join, reachability):
                continue
            entry = _common_dominator(operands[0], operands[1], dominator, reachability.index)
            if entry is None:
                continue
            inside = {n for n in reachability.closure({entry, join}) if n in dominator} - {entry}
            if (
                not any(_is_read_outside(node, inside, reachability) for node in inside - {join})
                and inside not in regions
            ):
                regions.append(inside)
    return sorted(regions, key=len)


def _dominators(through: Sequence[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    """Map each node to its immediate dominator among ``through``, a list in topological order."""
    position = {node: index for index, node in enumerate(through)}
    dominator: dict[fx.Node, fx.Node | None] = {}
    for node in through:
        before = [source for source in data_arguments(node) if source in position]
        nearest: fx.Node | None = before[0] if before else None
        for source in before[1:]:
            nearest = _common_dominator(nearest, source, dominator, position)
        dominator[node] = nearest
    return dominator


def _common_dominator(
    first: fx.Node | None,
    second: fx.Node | None,
    dominator: dict[fx.Node, fx.Node | None],
    position: dict[fx.Node, int],
) -> fx.Node | None:
    while first is not second:
        if first is None or second is None:
            return None
        if position[first] > position[second]:
            first = dominator[first]
        else:
            second = dominator[second]
    return first


def _is_read_outside(node: fx.Node, inside: set[fx.Node], reachability: Reachability) -> bool:
    """Whether the value of ``node`` is read outside the region by something that leads to the output."""
    output = reachability.order[-1]
    return any(
        user not in inside and node in data_arguments(user) and (user is output or reachability.reaches(user, output))
        for user in node.users
    )
