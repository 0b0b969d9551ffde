"""Read the structure of a temporal block off its nodes: ``h``, the ``g_i``, their readers, and what a block refuses."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.analysis.dependence import data_arguments
from tfmq_fx.passes.support.predicates import is_idle_dropout, is_weighted, module_path

__all__ = ["impurity", "linear_ancestry", "reading_module", "split_structure"]


def impurity(nodes: Collection[fx.Node]) -> str:
    """The sentence that names a random or mutating op among ``nodes``, or ``""``."""
    for node in nodes:
        target = node.target
        if not isinstance(target, OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in target.tags and not is_idle_dropout(node):
            return f"node {node.name!r} ({target}) on the time path draws random numbers"
        if schema_of(target).is_mutable:
            return f"node {node.name!r} ({target}) on the time path writes in place"
    return ""


def linear_ancestry(nodes: list[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Map each weighted node of the block to the weighted nodes before it."""
    before: dict[fx.Node, set[fx.Node]] = {}
    ancestry: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        reached: set[fx.Node] = set()
        for argument in data_arguments(node):
            reached |= before.get(argument, set())
        if is_weighted(node):
            ancestry[node] = set(reached)
            reached = reached | {node}
        before[node] = reached
    return ancestry


def split_structure(ancestry: dict[fx.Node, set[fx.Node]]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Tell the linears of ``h`` from those of the ``g_i``.

    A ``g_i`` is a last linear: no other temporal linear follows it. A single last linear with at most
    one before it is the end of ``h`` itself (class-conditional models add the label right after it).
    """
    followed = set().union(*ancestry.values()) if ancestry else set()
    last = [node for node in ancestry if node not in followed]
    if len(last) == 1 and len(ancestry[last[0]]) <= 1:
        return list(ancestry), []
    return [node for node in ancestry if node in followed], last


def reading_module(linear: fx.Node, members: set[fx.Node]) -> str:
    """The module path of the block that reads what ``linear`` computes."""
    seen: set[fx.Node] = set()
    queue = [linear]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user in members:
                queue.append(user)
            elif user.op != "output":
                return module_path(user)
    return ""
