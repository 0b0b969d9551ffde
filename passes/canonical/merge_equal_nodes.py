"""Compute once what is computed several times."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx._torch.operators import find_schema
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import replace_node

__all__ = ["MergeEqualNodes"]


def _key(value: Any) -> Hashable:
    """Arguments as something to compare: types count, since 1 and 1.0 are different arguments."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), repr(value)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.is_impure():
        return False
    schema = find_schema(node.target)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return schema is not None and not schema.is_mutable and not random


class MergeEqualNodes(GraphPass):
    """Send the users of a node to an earlier one with the same operator and arguments.

    Before::

        %a = reshape(%x, [-1, C])      %b = reshape(%x, [-1, C])

    After::

        %a = reshape(%x, [-1, C])      # read by the users of both

    Legality: the operator is a function: it neither writes to its arguments nor draws random numbers. Numerics are
    preserved to the bit.
    Meta: that of the first one.
    """

    id: ClassVar[str] = "tfmq::merge_equal_nodes"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Merge in one sweep: arguments were merged before the nodes that read them."""
        modified = False
        seen: dict[Hashable, fx.Node] = {}
        for node in list(graph_module.graph.nodes):
            if not _is_pure(node):
                continue
            first = seen.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
            if first is not node:
                replace_node(node, first)
                modified = True
        return modified
