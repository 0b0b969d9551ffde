"""Cut a part of a graph out as a module of its own, without a copy of any tensor."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx.passes.support.nodes import fake_mode_of, inherit, read_attribute
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["SIZE_OF", "extract_subgraph", "known_value"]

aten = torch.ops.aten

#: ``meta`` key of a size that is recomputed inside a subgraph: the name of the outer node that it stands for.
SIZE_OF = "tfmq_fx.size_of"


def known_value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """``meta["val"]`` of ``node``, or what it is bound to be: observers return their input and often record nothing."""
    if "val" in node.meta:
        return node.meta["val"]
    if node.op == "call_module" and node.args and isinstance(node.args[0], fx.Node):
        return known_value(graph_module, node.args[0])
    if node.op == "get_attr":
        value = read_attribute(graph_module, str(node.target))
        if isinstance(value, Tensor):
            return fake_mode_of(graph_module.graph).from_tensor(value, static_shapes=True)
    return None


def extract_subgraph(
    graph_module: fx.GraphModule, nodes: Collection[fx.Node], outputs: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy ``nodes`` into a graph module of their own.

    Args:
        graph_module: The graph; it is not changed.
        nodes: A convex set of its nodes, placeholders and the output node excepted.
        outputs: What the subgraph returns, out of ``nodes``: one alone as it is, several as a tuple.

    Returns:
        The module, and the nodes outside that are its inputs, in order. It *shares* parameters, buffers and
        submodules with ``graph_module``, under the same names. Metadata is copied, that of its placeholders too. A
        symbolic size from outside is read off an input that has it or divides it, so the module runs on a batch of any
        size by itself; only a size that no input leads to stays an input.
    """
    members = set(nodes)
    ordered = [node for node in graph_module.graph.nodes if node in members]
    read = {source for node in ordered for source in node.all_input_nodes} - members
    outside = [node for node in graph_module.graph.nodes if node in read]
    inner = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def add_input(node: fx.Node) -> None:
        copies[node] = inner.placeholder(node.name)
        if node.op == "placeholder":
            copies[node].meta.update(node.meta)
        copies[node].meta["val"] = known_value(graph_module, node)

    inputs = [node for node in outside if not isinstance(node_value(node), SymInt)]
    for node in inputs:
        add_input(node)
    tensors = list(inputs)
    for node in outside:
        if isinstance(node_value(node), SymInt) and not _is_recomputable(node, tensors, graph_module):
            add_input(node)
            inputs.append(node)
    for node in outside:
        if node not in copies:
            _recompute_size(inner, node, tensors, copies)
    for node in ordered:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    results = tuple(copies[node] for node in outputs)
    inner.output(results[0] if len(results) == 1 else results)
    inner.lint()
    return fx.GraphModule(graph_module, inner, class_name="Subgraph"), inputs


# -- sizes -------------------------------------------------------------------------------------------------------


def _axis(size: SymInt, tensors: Sequence[fx.Node], values: Sequence[Any]) -> tuple[fx.Node, int, int] | None:
    """The first of ``tensors`` that has ``size``, along which axis, and 1; else the same for a size that divides it."""
    found = None
    for node, value in zip(tensors, values, strict=True):
        for axis, candidate in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(candidate, SymInt):
                continue
            times = size.node.expr / candidate.node.expr
            if times == 1:
                return node, axis, 1
            if found is None and times.is_Integer and times > 1:  # tokens of all items in one axis
                found = node, axis, int(times)
    return found


def _is_arithmetic(node: fx.Node) -> bool:
    """Whether ``node`` computes a size from sizes."""
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and all(isinstance(node_value(s), SymInt) for s in sources)


def _is_recomputable(node: fx.Node, tensors: Sequence[fx.Node], graph_module: fx.GraphModule) -> bool:
    values = [known_value(graph_module, tensor) for tensor in tensors]
    if _axis(node_value(node), tensors, values) is not None:
        return True
    return _is_arithmetic(node) and all(_is_recomputable(s, tensors, graph_module) for s in node.all_input_nodes)


def _recompute_size(inner: fx.Graph, node: fx.Node, tensors: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> None:
    """Recompute the size ``node`` inside; ``_is_recomputable`` has said that it can be done."""
    if node in copies:
        return
    place = _axis(node_value(node), tensors, [copies[tensor].meta["val"] for tensor in tensors])
    if place is not None:
        source, axis, times = place
        name = node.name if times == 1 else None
        copy = inner.create_node("call_function", aten.sym_size.int, (copies[source], axis), name=name)
        inherit(copy, node)
        copy.meta["val"] = copies[source].meta["val"].shape[axis]
        if times > 1:
            copy = inner.create_node("call_function", operator.mul, (copy, times))
            inherit(copy, node)
            copy.meta["val"] = node.meta["val"]
    else:
        for source in node.all_input_nodes:
            _recompute_size(inner, source, tensors, copies)
        copy = inner.node_copy(node, copies.__getitem__)
    copy.meta[SIZE_OF] = node.name
    copies[node] = copy
