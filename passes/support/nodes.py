"""Insert nodes whose metadata is right from the first moment: value, module stack, origin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx._torch import pytree
from tfmq_fx._torch.tensors import FakeTensor, FakeTensorMode, enable_python_dispatcher
from tfmq_fx.passes.support.strides import axis_order, layout, refuses

__all__ = [
    "add_buffer",
    "argument_of",
    "compute_value",
    "erase_unread_attribute",
    "fake_mode_of",
    "inherit",
    "insert_call",
    "insert_get_attr",
    "insert_module_call",
    "read_attribute",
    "redirect_users",
    "replace_node",
]

aten = torch.ops.aten

#: What an inserted node takes over from the node that it is inserted for: where it comes from.
INHERITED = ("nn_module_stack", "stack_trace", "from_node")


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


def inherit(node: fx.Node, anchor: fx.Node) -> None:
    """Give ``node`` the origin of ``anchor``, but not its identity: it is an operator of its own.

    Quantizers find the operators of a layer by their source (``source_fn_stack``, then ``torch_fn``, then the module's
    type). A node that took these over would join the layer that it stands beside, and such a group is refused. A node
    that replaces its like is the layer: the first of them under its name, which parameters have too, the others alone.
    """
    for key in INHERITED:
        if key in anchor.meta:
            node.meta[key] = anchor.meta[key]
    if node.op == "call_function":
        node.meta["source_fn_stack"] = [_own_source(node, anchor)]


def _own_source(node: fx.Node, anchor: fx.Node) -> tuple[str, Any]:
    source = _source(anchor) if node.target is anchor.target else None
    if source is not None and not _is_source_used(source, node, anchor):
        return source
    kind = node.target if source is None else source[1]
    # fx gives names of erased nodes away again; one that replaced the erased node may go on under its name.
    names = itertools.chain([node.name], (f"{node.name}_{number}" for number in itertools.count(1)))
    return next((name, kind) for name in names if not _is_source_used((name, kind), node))


def _is_source_used(source: tuple[str, Any], *but: fx.Node) -> bool:
    return any(_has_source(other, source) for other in but[0].graph.nodes if other not in but)


def _source(node: fx.Node) -> tuple[str, Any] | None:
    """Name and function, or type of module, that ``node`` was traced from; None when that is not known."""
    if stack := node.meta.get("source_fn_stack"):
        name, kind = stack[-1]
        return str(name), kind
    if not (modules := node.meta.get("nn_module_stack")):
        return None
    path, kind = list(modules.values())[-1]
    if isinstance(kind, str):
        entry = getattr(nn, kind.rpartition(".")[2], None)
        kind = entry if isinstance(entry, type) and f"{entry.__module__}.{entry.__qualname__}" == kind else None
    return None if kind is None else (str(path), kind)


def _has_source(node: fx.Node, source: tuple[str, Any]) -> bool:
    """Whether ``node`` computes and says that it comes from ``source``."""
    stack: Any = node.meta.get("source_fn_stack")
    return node.op == "call_function" and bool(stack) and tuple(stack[-1]) == source


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
    inherit(node, anchor)
    values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = compute_value(fake_mode_of(graph), target, *values)
    return node


def insert_module_call(graph: fx.Graph, target: str, args: Sequence[Any], *, anchor: fx.Node) -> fx.Node:
    """Insert a call of the submodule ``target``, an observer: its value is that of its first argument."""
    node = graph.call_module(target, tuple(args))
    inherit(node, anchor)
    node.meta["val"] = args[0].meta["val"]
    return node


def insert_get_attr(graph_module: fx.GraphModule, name: str, *, anchor: fx.Node) -> fx.Node:
    """Insert a read of the parameter or buffer ``name`` at the graph's insertion point."""
    graph = graph_module.graph
    node = graph.create_node("get_attr", name)
    inherit(node, anchor)
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


def replace_node(node: fx.Node, replacement: fx.Node, *, results: bool = True) -> None:
    """Send every user of ``node`` to ``replacement`` (:func:`redirect_users`) and erase ``node``."""
    redirect_users(node, replacement, results=results)
    node.graph.erase_node(node)


def redirect_users(node: fx.Node, replacement: fx.Node, *, results: bool = True) -> None:
    """Send every user of ``node`` to ``replacement``.

    Where the strides of the two differ and something behind them needs the old ones (a ``view``, an output), the
    old layout is put back behind ``replacement``; otherwise the values recorded from there on are brought up to date.
    With ``results=False`` the graph's own results may get other strides: kernels do not copy what they return.
    """
    recorded: Any = node.meta.get("val")
    users = list(node.users)
    node.replace_all_uses_with(replacement)
    value = replacement.meta.get("val")
    if not isinstance(recorded, Tensor) or not isinstance(value, Tensor) or recorded.ndim != value.ndim:
        return
    if layout(recorded) == layout(value):
        return
    changed = _follow_strides(replacement, users, results)
    if changed is None:
        restored = _with_layout_of(recorded, replacement)
        for user in users:
            user.replace_input_with(replacement, restored)
        return
    for user, new in changed.items():
        user.meta["val"] = new


def _follow_strides(source: fx.Node, users: Collection[fx.Node], results: bool) -> dict[fx.Node, Any] | None:
    """New values of all that sees the strides of ``source`` through ``users``, None where one cannot have them."""
    changed: dict[fx.Node, Any] = {}
    mode, node = fake_mode_of(source.graph), source.next
    while node.op != "root":
        sees = node in users or any(read in changed for read in node.all_input_nodes)
        if sees and (results or node.op != "output"):
            try:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: changed.get(n, n.meta.get("val")))
                target: Any = node.target
                value = args[0] if node.op == "call_module" else compute_value(mode, target, args, kwargs)
            except Exception:  # each operator has its own words for a layout that it does not take
                return None
            if node.op == "output" or "val" not in node.meta or refuses(node.target, args):
                return None
            if _layouts(value) != _layouts(node.meta["val"]):
                changed[node] = value
        node = node.next
    return changed


def _layouts(value: Any) -> list[tuple[str, ...]]:
    return [layout(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _with_layout_of(recorded: Tensor, node: fx.Node) -> fx.Node:
    """Insert behind ``node`` what gives it the strides of ``recorded``."""
    order = axis_order(recorded)
    graph, plain = node.graph, order == sorted(order)
    with graph.inserting_before(node.next):
        permuted = node if plain else insert_call(graph, aten.permute.default, (node, order), anchor=node)
        dense = insert_call(graph, aten.contiguous.default, (permuted,), anchor=node)
        inverse = [order.index(axis) for axis in range(len(order))]
        return dense if plain else insert_call(graph, aten.permute.default, (dense, inverse), anchor=node)
