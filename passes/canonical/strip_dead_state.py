"""Remove dead nodes and the parameters, buffers and submodules that nothing reads."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import fx, nn

from tfmq_fx._torch.modules import children_by_name
from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import read_attribute

__all__ = ["StripDeadState"]


class StripDeadState(GraphPass):
    """Erase nodes without users and the state that no node reads.

    Before::

        %w = get_attr[conv.weight]                     # nothing reads it: the int8 weight took its place
        %q = get_attr[_frozen_param0]      %y = conv2d(%x, dequantize(%q), ...)

    After::

        %q = get_attr[_frozen_param0]      %y = conv2d(%x, dequantize(%q), ...)

    Legality: an ATen graph is functional; a node without users and without side effects computes
    nothing that anyone sees. Placeholders stay, they are the interface. Numerics are preserved to the
    bit; the state dict shrinks (``convert_pt2e`` leaves every float weight beside its integer copy).
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::strip_dead_state"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing: values are not looked at."""

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Erase dead nodes, then unread tensors, then empty submodules."""
        modified = _erase_dead_nodes(graph_module.graph)
        read = {str(n.target) for n in graph_module.graph.nodes if n.op in ("get_attr", "call_module")}
        modified |= _delete_unread_tensors(graph_module, read)
        modified |= _delete_unread_modules(graph_module, read)
        return modified


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module":
        return False
    target = node.target
    if isinstance(target, OpOverload) and schema_of(target).is_mutable:
        return True
    return bool(node.is_impure())


def _erase_dead_nodes(graph: fx.Graph) -> bool:
    modified = False
    for node in reversed(list(graph.nodes)):
        if not node.users and not _has_effect(node):
            graph.erase_node(node)
            modified = True
    return modified


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    owner: Any = read_attribute(root, path) if path else root
    return owner, leaf


def _is_read(name: str, read: set[str]) -> bool:
    """Whether ``name`` itself, or a module that contains it, is read."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in read for end in range(1, len(parts) + 1))


def _unread_places(root: nn.Module, needed: dict[str, bool]) -> list[tuple[nn.Module, str]]:
    """Where to delete: each place once, and none that is needed under another name of the same module."""
    places = {name: _owner(root, name) for name in needed}
    live = {(id(owner), leaf) for name, (owner, leaf) in places.items() if needed[name]}
    unread = {(id(owner), leaf): (owner, leaf) for name, (owner, leaf) in places.items() if not needed[name]}
    return [place for key, place in unread.items() if key not in live]


def _delete_unread_tensors(root: nn.Module, read: set[str]) -> bool:
    tensors = [n for n, _ in root.named_parameters(remove_duplicate=False)]
    tensors += [n for n, _ in root.named_buffers(remove_duplicate=False)]
    tensors += [n for n, value in vars(root).items() if isinstance(value, torch.Tensor)]
    dead = _unread_places(root, {name: _is_read(name, read) for name in tensors})
    for owner, leaf in dead:
        delattr(owner, leaf)
    return bool(dead)


def _delete_unread_modules(root: nn.Module, read: set[str]) -> bool:
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    inside = {target[: end.start()] for target in read for end in re.finditer(r"\.", target)}
    dead = _unread_places(root, {name: name in inside or _is_read(name, read) for name in names})
    for owner, leaf in dead:
        del children_by_name(owner)[leaf]
    return bool(dead)
