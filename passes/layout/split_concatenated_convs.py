"""Split a convolution of a concatenation into a sum of convolutions, one per part."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import (
    add_buffer,
    erase_unread_attribute,
    insert_call,
    insert_get_attr,
    read_attribute,
    replace_node,
)
from tfmq_fx.passes.support.predicates import constant_weight, is_call, is_conv, node_value, weight_node

__all__ = ["SplitConcatenatedConvs"]

aten = torch.ops.aten
GROUPS = {aten.conv1d.default: 6, aten.conv2d.default: 6, aten.conv3d.default: 6, aten.convolution.default: 8}


def concatenated_parts(node: Any) -> list[fx.Node] | None:
    """The parts when ``node`` is an ungrouped conv whose input concatenates channels, else None."""
    if not is_conv(node) or not is_call(node.args[0], aten.cat.default):
        return None
    target: Any = node.target
    position = GROUPS[target]
    groups = node.args[position] if position < len(node.args) else node.kwargs.get("groups", 1)
    weight = weight_node(node)
    if groups != 1 or weight is None or weight is not node.args[1]:
        return None
    parts = channel_parts(node.args[0], node_value(weight))
    return parts if parts is not None and len(parts) > 1 else None


def channel_parts(node: Any, weight: Any) -> list[fx.Node] | None:
    """The parts when ``node`` concatenates channels for a conv of ``weight``, else None.

    A part that is such a concatenation itself counts as its own parts.
    """
    if not is_call(node, aten.cat.default):
        return None
    cat: Any = node
    axis = cat.args[1] if len(cat.args) > 1 else 0
    whole = node_value(cat)
    if axis not in (1, 1 - whole.ndim) or not all(_is_channel_part(node_value(p), whole, weight) for p in cat.args[0]):
        return None
    return [inner for part in cat.args[0] for inner in channel_parts(part, weight) or [part]]


def _is_channel_part(value: Any, whole: Any, weight: Any) -> bool:
    """Whether ``value`` holds some channels of a batched ``whole``; a mixed concatenation promotes its parts."""
    if not isinstance(value, Tensor) or value.dtype != whole.dtype or value.ndim != weight.ndim:
        return False
    return isinstance(value.shape[1], int)


class SplitConcatenatedConvs(GraphPass):
    """Give each part of a concatenated input its own convolution, so that each can have its own scale.

    Before::

        %c = cat([%h, %skip], 1)      %y = conv2d(%c, %w, %b)

    After::

        %l = conv2d(%h, %w[:, :k], %b)      %r = conv2d(%skip, %w[:, k:], None)      %y = add(%l, %r)

    Legality: a convolution is linear in its input channels; ungrouped convs with a constant weight
    only. Numerics are preserved up to the order of float sums. ``h`` and ``skip`` of a UNet have very
    different ranges (Q-Diffusion, ICCV 2023, section 3.3): with one scale the narrow one loses its levels.
    A concatenation with other readers (the norm of the residual block) stays for them. Concatenations of
    concatenations are split into all their parts.
    Meta: the new nodes take the module stack of the conv; the weight's slices are buffers named after it, and it
    is gone when nothing else reads it.
    """

    id: ClassVar[str] = "tfmq::split_concatenated_convs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Split every conv that reads a concatenation directly."""
        modified = False
        for node in list(graph_module.graph.nodes):
            parts = concatenated_parts(node)
            if parts is not None:
                _split(graph_module, node, parts)
                modified = True
        return modified


def _split(graph_module: fx.GraphModule, node: fx.Node, parts: list[fx.Node]) -> None:
    graph = graph_module.graph
    target: Any = node.target
    cat: Any = node.args[0]
    whole = constant_weight(node, SplitConcatenatedConvs.id)
    name = str(whole.target)
    weight = read_attribute(graph_module, name)
    widths = [int(node_value(part).shape[1]) for part in parts]
    kwargs = dict(node.kwargs)
    bias = node.args[2] if len(node.args) > 2 else kwargs.pop("bias", None)
    rest = node.args[3:]
    convs: list[fx.Node] = []
    with graph.inserting_before(node):
        for index, (part, piece) in enumerate(zip(parts, weight.detach().split(widths, dim=1), strict=True)):
            buffer = add_buffer(graph_module, f"{name}_part{index}", piece.contiguous())
            read = insert_get_attr(graph_module, buffer, anchor=node)
            args = (part, read, bias if index == 0 else None, *rest)
            convs.append(insert_call(graph, target, args, anchor=node, kwargs=kwargs))
            if index:
                convs = [insert_call(graph, aten.add.Tensor, tuple(convs), anchor=node)]
    (total,) = convs
    replace_node(node, total)
    # Half of a UNet's weights are split; both copies at once would not fit where the model just fits.
    erase_unread_attribute(graph_module, whole)
    _erase_unread_concatenations(graph, cat)


def _erase_unread_concatenations(graph: fx.Graph, cat: fx.Node) -> None:
    queue, erased = [cat], set()
    while queue:
        node = queue.pop()
        if node not in erased and is_call(node, aten.cat.default) and not node.users:
            queue.extend(node.all_input_nodes)
            graph.erase_node(node)
            erased.add(node)
