"""Remove assertions and guards that a capture leaves behind."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx._torch.modules import GUARDS as GUARDS_MODULE
from tfmq_fx._torch.operators import CHECK
from tfmq_fx.passes.base import GraphPass, Numerics

__all__ = ["RemoveGuards"]

aten = torch.ops.aten

GUARDS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    CHECK,
)


def is_guard(node: Any) -> bool:
    """Whether ``node`` only checks: an assertion op, or the guards function of an exported module."""
    if node.op == "call_module":
        return bool(node.target == "_guards_fn")
    return node.op == "call_function" and node.target in GUARDS


class RemoveGuards(GraphPass):
    """Erase assertions about metadata, ranges and scalars, and the guards function of ``ep.module()``.

    Before::

        %check = _assert_tensor_metadata(%x, ...)      %y = silu(%x)

    After::

        %y = silu(%x)

    Legality: a guard returns nothing that is read; on inputs that pass it the program is the same.
    A guard with a user is left alone. Numerics are preserved to the bit.
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::remove_guards"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing: guards have no value to look at."""

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Erase every guard that nobody reads, then what only the guards read."""
        guards = [node for node in graph_module.graph.nodes if is_guard(node) and not node.users]
        for node in reversed(guards):
            sources = node.all_input_nodes
            graph_module.graph.erase_node(node)
            _erase_unread_conditions(graph_module.graph, sources)
        if guards and hasattr(graph_module, GUARDS_MODULE) and not _is_called(graph_module, GUARDS_MODULE):
            delattr(graph_module, GUARDS_MODULE)
        return bool(guards)


def _erase_unread_conditions(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase the comparisons that fed an erased assertion and that nothing else reads."""
    queue, erased = list(nodes), set()
    while queue:
        node = queue.pop()
        if node in erased or node.op != "call_function" or node.users or node.is_impure():
            continue
        queue.extend(node.all_input_nodes)
        graph.erase_node(node)
        erased.add(node)


def _is_called(graph_module: fx.GraphModule, name: str) -> bool:
    return any(node.op == "call_module" and node.target == name for node in graph_module.graph.nodes)
