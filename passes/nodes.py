"""Insert nodes whose metadata is right from the first moment: value, module stack, origin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tfmq_fx._compat import FakeTensor, FakeTensorMode, enable_python_dispatcher

__all__ = [
    "add_buffer",
    "argument_of",
    "compute_value",
    "erase_unread_attribute",
    "fake_mode_of",
    "insert_call",
    "insert_get_attr",
    "insert_module_call",
    "read_attribute",
    "replace_node",
]

#: What an inserted node takes over from the node that it is inserted for.
INHERITED = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack", "from_node")


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the values in ``graph``, or a fresh one when it has none."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def compute_value(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The value of ``target(*args, **kwargs)`` for fake arguments of ``mode``; symbolic sizes stay symbolic."""
    # Without the Python dispatcher, what C++ decomposes (padding, for one) turns symbolic sizes into numbers,
    # and with them every shape in the graph.
    with mode, enable_python_dispatcher(), torch.no_grad():
        return target(*args, **kwargs)


def _inherit(node: fx.Node, anchor: fx.Node) -> None:
    for key in INHERITED:
        if key in anchor.meta:
            node.meta[key] = anchor.meta[key]


def insert_call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: Sequence[Any],
    *,
    anchor: fx.Node,
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` at the graph's insertion point.

    ``meta["val"]`` is computed from the arguments' values under their own fake mode, so symbolic
    batch sizes stay symbolic; the module stack and origin are those of ``anchor``.
    """
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    _inherit(node, anchor)
    values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = compute_value(fake_mode_of(graph), target, *values)
    return node


def insert_module_call(graph: fx.Graph, target: str, args: Sequence[Any], *, anchor: fx.Node) -> fx.Node:
    """Insert a call of the submodule ``target``, an observer: its value is that of its first argument."""
    node = graph.call_module(target, tuple(args))
    _inherit(node, anchor)
    node.meta["val"] = args[0].meta["val"]
    return node


def insert_get_attr(graph_module: fx.GraphModule, name: str, *, anchor: fx.Node) -> fx.Node:
    """Insert a read of the parameter or buffer ``name`` at the graph's insertion point."""
    graph = graph_module.graph
    node = graph.create_node("get_attr", name)
    _inherit(node, anchor)
    node.meta["val"] = fake_mode_of(graph).from_tensor(read_attribute(graph_module, name), static_shapes=True)
    return node


def add_buffer(graph_module: fx.GraphModule, name: str, value: Tensor) -> str:
    """Register ``value`` as a buffer under ``name``, or ``name_1``, ``name_2`` … when taken; return the name."""
    flat, count = name.replace(".", "_"), 0
    free = flat
    while hasattr(graph_module, free):
        count += 1
        free = f"{flat}_{count}"
    graph_module.register_buffer(free, value)
    return free


def argument_of(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """The argument of a call at ``position``, or of that ``name``, or ``default`` where the call leaves it out."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def read_attribute(graph_module: torch.nn.Module, name: str) -> Any:
    """Return the parameter, buffer or module at the dotted path ``name``."""
    value: Any = graph_module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def erase_unread_attribute(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Erase the ``get_attr`` ``node`` if it has no users, and its tensor if no other node reads that."""
    if node.users:
        return
    name = str(node.target)
    node.graph.erase_node(node)
    if not any(other.op == "get_attr" and other.target == name for other in graph_module.graph.nodes):
        path, _, leaf = name.rpartition(".")
        delattr(graph_module.get_submodule(path), leaf)


def replace_node(node: fx.Node, replacement: fx.Node) -> None:
    """Send every user of ``node`` to ``replacement`` and erase ``node``."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)
