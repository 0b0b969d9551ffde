"""Put the operators of regions that change nothing back into the graph around them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx, nn

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import erase_unread_attribute, read_attribute
from tfmq_fx.passes.support.predicates import is_getitem

__all__ = ["InlineRegions", "changes_numerics", "region_body"]

higher_order = torch.ops.higher_order

#: Where a region's operator takes its body, and how many arguments behind it are none of the body's.
BODIES = {
    higher_order.wrap_with_set_grad_enabled: (1, 0),
    higher_order.wrap_with_autocast: (4, 0),
    higher_order.tag_activation_checkpoint: (0, 0),
    higher_order.invoke_subgraph: (0, 1),
}


def changes_numerics(node: fx.Node) -> bool:
    """Whether a region computes in another dtype than its operators say: autocast of the CPU, switched on."""
    device, enabled = (node.args[0], node.args[2]) if node.target is higher_order.wrap_with_autocast else ("", False)
    return device == "cpu" and bool(enabled)


def region_body(node: Any) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The read of a region's body and what the body is called with; None for any other node."""
    if node.op != "call_function" or node.target not in BODIES:
        return None
    position, skipped = BODIES[node.target]
    body = node.args[position]
    inside = isinstance(body, fx.Node) and body.op == "get_attr"
    return (body, node.args[position + 1 + skipped :]) if inside else None


class InlineRegions(GraphPass):
    """Copy the body of a region in place of the call.

    Before::

        %body = get_attr[submod_1]                     # linear(%a, %b, %c), returned as a tuple
        %r = wrap_with_set_grad_enabled(True, %body, %x, %w, %bias)      %y = getitem(%r, 0)

    After::

        %y = linear(%x, %w, %bias)

    Legality: whether gradients are recorded changes no value, nor does autocast that is switched off or meant for
    another device, nor a checkpoint of activations. Autocast of the CPU that is switched on is left alone: its
    operators compute in another dtype than the graph says. Regions in regions are inlined from the inside. Numerics
    are preserved to the bit.
    Meta: the operators of the body keep theirs.
    """

    id: ClassVar[str] = "tfmq::inline_regions"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Nothing: values are not looked at, and guards, which have none, may still be there."""

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Inline every region."""
        inlined = [node for node in graph_module.graph.nodes if _is_harmless(node)]
        for node in inlined:
            _inline(graph_module, node)
        return bool(inlined)


def _is_harmless(node: Any) -> bool:
    return isinstance(node, fx.Node) and region_body(node) is not None and not changes_numerics(node)


def _inline(graph_module: fx.GraphModule, node: fx.Node) -> None:
    region = region_body(node)
    assert region is not None
    body, operands = region
    graph, inner = graph_module.graph, read_attribute(graph_module, str(body.target))
    values: dict[fx.Node, Any] = {}
    remaining = iter(operands)
    results: Any = ()
    with graph.inserting_before(node):
        for step in list(inner.graph.nodes):
            if step.op == "placeholder":
                values[step] = next(remaining)
            elif step.op == "output":
                results = fx.node.map_arg(step.args[0], values.__getitem__)
            else:
                values[step] = _copy_node(graph_module, inner, step, values)
    _replace_results(node, results)
    graph.erase_node(node)
    erase_unread_attribute(graph_module, body)
    # Copied regions are those that the body held: one of another kind, or one to be inlined as well.
    for step, copy in values.items():
        if step.op == "call_function" and _is_harmless(copy):
            _inline(graph_module, copy)


def _copy_node(graph_module: fx.GraphModule, inner: Any, step: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    """A node of the body in the graph around it; what it reads moves along."""
    copy = graph_module.graph.node_copy(step, values.__getitem__)
    if step.op in ("get_attr", "call_module"):
        copy.target = _register_beside(graph_module, str(step.target), read_attribute(inner, str(step.target)))
    return copy


def _register_beside(graph_module: fx.GraphModule, name: str, value: Any) -> str:
    """Register what a body holds beside it, under its own name where that is free."""
    free, count = name.replace(".", "_"), 0
    while hasattr(graph_module, free):
        count += 1
        free = f"{name.replace('.', '_')}_{count}"
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        graph_module.register_buffer(free, value)
    else:
        setattr(graph_module, free, value)
    return free


def _replace_results(node: fx.Node, results: Any) -> None:
    """Send the readers of a region's results to what the body computed."""
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
        return
    for reader in list(node.users):
        if is_getitem(reader):
            reader.replace_all_uses_with(results[reader.args[1]])
            node.graph.erase_node(reader)
    if node.users:
        node.replace_all_uses_with(results)
