"""Compute a new value where an operator writes into its argument."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import OpOverload, functional_twin, schema_of
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.memory import memory_of
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of, insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, is_idle_dropout

__all__ = ["DETACH", "ReplaceInPlace"]

aten = torch.ops.aten

#: It writes by its name alone: constants that a model makes while it runs are exported with it.
DETACH = aten.detach_.default
#: What makes a part of a value, and what puts another part into its place.
SCATTERS: dict[Any, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def functional_overload(target: Any) -> OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None for what does not write to its first argument alone."""
    if not isinstance(target, OpOverload) or target.namespace != "aten" or not schema_of(target).is_mutable:
        return None
    written = [
        argument.alias_info is not None and argument.alias_info.is_write for argument in schema_of(target).arguments
    ]
    if written != [True, *[False] * (len(written) - 1)]:
        return None
    functional = functional_twin(target)
    return None if functional is None or schema_of(functional).is_mutable else functional


class ReplaceInPlace(GraphPass):
    """Replace an operator that writes into a computed value by the one that computes a new value.

    Before::

        %h = conv2d(%x, %w)
        %r = relu_(%h)
        %part = slice(%h, 1, 0, 2)
        %written = copy_(%part, %z)
        %y = add(%h, %x)

    After::

        %h = conv2d(%x, %w)
        %r = relu(%h)
        %whole = slice_scatter(%r, %z, 1, 0, 2)
        %y = add(%whole, %x)

    Legality: what is written to is no input and no weight, whose change could be seen from outside; it is the value of
    a node or a part of it that ``slice`` and ``select`` give, one in the other; nothing else that lies in the same
    memory is read afterwards but such parts, which are then parts of the new value; and the new value has the shape
    and dtype of the old. Then whoever read the old value afterwards reads the new one, and parts of the old one are
    parts of the new. ``detach_`` writes no values, whatever it is given, and goes.
    Numerics are preserved to the bit.
    Meta: what is new takes the module stack of the call that wrote.
    """

    id: ClassVar[str] = "tfmq::replace_in_place"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace the calls in order, so that the result of one may be written to by the next."""
        order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
        calls = _Calls(order, _memory(graph_module.graph))
        modified = False
        for node in list(order):
            if is_call(node, DETACH):
                replace_node(node, argument_node(node, 0))
                del order[node]
                modified = True
            else:
                modified = calls.replace(node) or modified
        return modified


class _Calls:
    """The nodes of a graph, in their order, and the memory that each lies in, while writes are replaced."""

    def __init__(self, order: dict[fx.Node, int], memory: dict[fx.Node, set[int]]) -> None:
        self.order, self.memory = order, memory

    def replace(self, node: fx.Node) -> bool:
        """Replace a node where it writes and may be replaced."""
        target = functional_overload(node.target) if node.op == "call_function" else None
        if target is None or not isinstance(node.args[0], fx.Node):
            return False
        written = node.args[0]
        views = _views(written)
        whole = argument_node(views[-1], 0) if views else written
        before = [other for other in self.order if self.order[other] < self.order[node]]
        shared = [other for other in before if self.memory[other] & self.memory[written]]
        read = {other for other in shared if self._later(other, node)}
        siblings = [other for other in before if other in read - {whole, *views, written} and _whole_of(other) is whole]
        if any(other.op != "call_function" for other in shared) or read - {whole, *views, written, *siblings}:
            return False
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        value = compute_value(fake_mode_of(node.graph), target, args, kwargs)
        if not _same_metadata(value, written.meta["val"]):
            return False
        readers = {sibling: self._later(sibling, node) for sibling in siblings}
        if views:
            new = self._replace_part(node, target, views, whole)
        else:
            for user in self._later(written, node):
                user.replace_input_with(written, node)
            # Its recorded value stays: it has this shape and dtype, and shares its memory with the views made of it.
            node.target, new = target, node
        for sibling, users in readers.items():
            self._read_from(new, sibling, users)
        return True

    def _read_from(self, whole: fx.Node, sibling: fx.Node, users: list[fx.Node]) -> None:
        """Have ``users`` read the part that ``sibling`` is of the value that was written, not of the old one."""
        part = whole
        for view in reversed(_views(sibling)):
            assert isinstance(view.target, OpOverload)
            args, kwargs = (part, *view.args[1:]), dict(view.kwargs)
            with whole.graph.inserting_after(part):
                part = insert_call(whole.graph, view.target, args, anchor=whole, kwargs=kwargs)
            self.order[part], self.memory[part] = self.order[whole], self.memory[whole]
        for user in users:
            user.replace_input_with(sibling, part)

    def _later(self, other: fx.Node, node: fx.Node) -> list[fx.Node]:
        return [user for user in other.users if self.order[user] > self.order[node]]

    def _replace_part(self, node: fx.Node, target: OpOverload, views: list[fx.Node], whole: fx.Node) -> fx.Node:
        written, graph = views[0], node.graph
        later, known = {view: self._later(view, node) for view in (*views, whole)}, set(graph.nodes)
        with graph.inserting_before(node):
            new = _part(node, target, written)
            for view in views:
                outer = (argument_node(view, 0), new, *view.args[1:])
                new = insert_call(graph, SCATTERS[view.target], outer, anchor=node, kwargs=dict(view.kwargs))
            for user in later[whole]:
                user.replace_input_with(whole, new)
            # Parts are read from the new whole, so that what writes into them next writes into that.
            part = new
            for depth, view in reversed(list(enumerate(views))):
                if not node.users and not any(later[inner] for inner in views[: depth + 1]):
                    break
                assert isinstance(view.target, OpOverload)
                part = insert_call(graph, view.target, (part, *view.args[1:]), anchor=node, kwargs=dict(view.kwargs))
                for user in later[view]:
                    user.replace_input_with(view, part)
            for user in list(node.users):
                user.replace_input_with(node, part)
        for other in graph.nodes:
            if other not in known:
                self.order[other], self.memory[other] = self.order[node], self.memory[whole]
        graph.erase_node(node)
        del self.order[node]
        for view in views:
            if not view.users:
                graph.erase_node(view)
                del self.order[view]
        return new


def _memory(graph: fx.Graph) -> dict[fx.Node, set[int]]:
    """Where each value lies; a dropout that drops nothing is its argument, which its recorded value does not say."""
    memory: dict[fx.Node, set[int]] = {}
    same: dict[int, set[int]] = {}
    for node in graph.nodes:
        own = memory_of(node)
        if is_idle_dropout(node):
            same |= dict.fromkeys(own, memory[node.args[0]])
        memory[node] = own.union(*(same.get(storage, set()) for storage in own))
    return memory


def _views(node: fx.Node) -> list[fx.Node]:
    """The parts that lead from ``node`` to the whole: each one's first argument is the next."""
    views = []
    while node.op == "call_function" and node.target in SCATTERS and isinstance(node.args[0], fx.Node):
        views.append(node)
        node = node.args[0]
    return views


def _whole_of(node: fx.Node) -> fx.Node | None:
    """What ``node`` is a part of; None where it is no part."""
    views = _views(node)
    return argument_node(views[-1], 0) if views else None


def _part(node: fx.Node, target: OpOverload, written: fx.Node) -> fx.Node:
    """What ``node`` writes, as a value of the shape and dtype of what it writes to."""
    if target is not aten.copy.default:
        return insert_call(node.graph, target, node.args, anchor=node, kwargs=dict(node.kwargs))
    source, value = argument_node(node, 1), written.meta["val"]
    if source.meta["val"].dtype != value.dtype:
        source = insert_call(node.graph, aten.to.dtype, (source, value.dtype), anchor=node)
    if _sizes(source.meta["val"]) != _sizes(value):
        source = insert_call(node.graph, aten.expand_as.default, (source, written), anchor=node)
    return source


def _sizes(value: Tensor) -> tuple[str, ...]:
    return tuple(map(str, value.shape))


def _same_metadata(value: Any, other: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(other, Tensor)
        and value.dtype == other.dtype
        and _sizes(value) == _sizes(other)
    )
