"""Remove dead nodes and the parameters, buffers and submodules that nothing reads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx, nn

from .base import GraphPass
from .nodes import read_attribute

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
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable) or node.is_impure()
    return False


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


def _delete_unread_tensors(root: nn.Module, read: set[str]) -> bool:
    tensors = [n for n, _ in root.named_parameters(remove_duplicate=False)]
    tensors += [n for n, _ in root.named_buffers(remove_duplicate=False)]
    tensors += [n for n, value in vars(root).items() if isinstance(value, torch.Tensor)]
    dead = [name for name in tensors if not _is_read(name, read)]
    for name in dead:
        owner, leaf = _owner(root, name)
        delattr(owner, leaf)
    return bool(dead)


def _delete_unread_modules(root: nn.Module, read: set[str]) -> bool:
    modified = False
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    for name in sorted(names, key=lambda n: -n.count(".")):
        needed = _is_read(name, read) or any(target.startswith(f"{name}.") for target in read)
        if not needed:
            owner, leaf = _owner(root, name)
            del owner._modules[leaf]
            modified = True
    return modified
