"""Compute one-dimensional convolutions as two-dimensional ones of height 1."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import (
    add_buffer,
    argument_of,
    erase_unread_attribute,
    insert_call,
    insert_get_attr,
    read_attribute,
    replace_node,
)
from tfmq_fx.passes.support.predicates import constant_weight, is_call, node_value, weight_node

__all__ = ["WidenSequenceConvs", "convolves_sequence"]

aten = torch.ops.aten

#: Where ``conv1d`` takes the sizes of its window, with what ``conv2d`` does along the new axis.
WINDOW = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def convolves_sequence(node: Any) -> bool:
    """Whether ``node`` is a 1-d convolution of a batch with a stored kernel of more than one value."""
    if not is_call(node, aten.conv1d.default) or not isinstance(node.args[0], fx.Node):
        return False
    value, weight = node_value(node.args[0]), weight_node(node)
    if not isinstance(value, Tensor) or value.ndim != 3 or weight is None or weight is not node.args[1]:
        return False
    return int(node_value(weight).shape[2]) > 1


class WidenSequenceConvs(GraphPass):
    """Give a 1-d convolution an axis of height 1.

    Before::

        %y = conv1d(%x, %w, %b, [1], [2])                                         # %x: [N, C, L], %w: [O, C, 5]

    After::

        %f = unsqueeze(%x, 2)      %z = conv2d(%f, %w[:, :, None], %b, [1, 1], [0, 2])      %y = squeeze(%z, 2)

    Legality: the kernel has height 1 and nothing is padded along it. Numerics are preserved up to the order of float
    sums.
    Why: torch 2.13 lowers a quantized ``conv1d`` to the two-dimensional integer kernel with the padding on the wrong
    axis, which fails for every kernel of more than one value.
    Meta: the new nodes take the module stack of the convolution; its weight is a buffer named after it.
    """

    id: ClassVar[str] = "tfmq::widen_sequence_convs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Widen every such convolution."""
        convolutions = [node for node in graph_module.graph.nodes if convolves_sequence(node)]
        for node in convolutions:
            _widen(graph_module, node)
        return bool(convolutions)


def _widen(graph_module: fx.GraphModule, node: fx.Node) -> None:
    graph, stored_weight = graph_module.graph, constant_weight(node, WidenSequenceConvs.id)
    name = str(stored_weight.target)
    buffer = add_buffer(graph_module, f"{name}_2d", read_attribute(graph_module, name).detach().unsqueeze(2))
    window = [[neutral, argument_of(node, position, size, [neutral])[0]] for position, size, neutral in WINDOW]
    bias, groups = argument_of(node, 2, "bias", None), argument_of(node, 6, "groups", 1)
    with graph.inserting_before(node):
        weight = insert_get_attr(graph_module, buffer, anchor=node)
        widened = insert_call(graph, aten.unsqueeze.default, (node.args[0], 2), anchor=node)
        conv = insert_call(graph, aten.conv2d.default, (widened, weight, bias, *window, groups), anchor=node)
        narrowed = insert_call(graph, aten.squeeze.dim, (conv, 2), anchor=node)
    replace_node(node, narrowed)
    erase_unread_attribute(graph_module, stored_weight)
