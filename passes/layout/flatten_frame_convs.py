"""Compute convolutions along the frames of a video as two-dimensional ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
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

__all__ = ["FlattenFrameConvs", "convolves_frames"]

aten = torch.ops.aten

#: Where ``conv3d`` takes the sizes of its window.
WINDOW = ((3, "stride"), (4, "padding"), (5, "dilation"))
#: Stride, padding and dilation that leave an axis with a kernel of one alone, as ``conv3d`` takes them.
NEUTRAL = (1, 0, 1)


def _window(node: fx.Node) -> list[list[int]]:
    """Stride, padding and dilation, three numbers each."""
    arguments = zip(WINDOW, NEUTRAL, strict=True)
    sizes = [list(argument_of(node, position, name, [neutral])) for (position, name), neutral in arguments]
    return [size * 3 if len(size) == 1 else size for size in sizes]


def convolves_frames(node: Any) -> bool:
    """Whether ``node`` is a 3-d convolution of a batch with kernel ``[k, 1, 1]``: it looks along the frames alone."""
    if not is_call(node, aten.conv3d.default) or not isinstance(node.args[0], fx.Node):
        return False
    value, weight = node_value(node.args[0]), weight_node(node)
    if not isinstance(value, Tensor) or value.ndim != 5 or weight is None or weight is not node.args[1]:
        return False
    if not all(isinstance(size, int) for size in (*value.shape[1:], *node_value(node).shape[1:])):
        return False
    stride, padding, dilation = _window(node)
    fixed = all((stride[axis], padding[axis], dilation[axis]) == NEUTRAL for axis in (1, 2))
    return fixed and tuple(node_value(weight).shape[3:]) == (1, 1)


class FlattenFrameConvs(GraphPass):
    """Fold height and width into one axis around a 3-d convolution that looks along the frames alone.

    Before::

        %y = conv3d(%x, %w, %b, [1, 1, 1], [1, 0, 0])                  # %x: [N, C, T, H, W], %w: [O, C, 3, 1, 1]

    After::

        %f = reshape(%x, [-1, C, T, HW])      %z = conv2d(%f, %w[..., 0], %b, [1, 1], [1, 0])
        %y = reshape(%z, [-1, O, T, H, W])

    Legality: the kernel has one weight along height and width, so all positions of a frame are treated alike.
    Numerics are preserved up to the order of float sums.
    Why: there are integer kernels for 1-d and 2-d convolutions only, and video UNets follow every residual block
    by convolutions along the frames.
    Meta: the new nodes take the module stack of the convolution; its weight is a buffer named after it.
    """

    id: ClassVar[str] = "tfmq::flatten_frame_convs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fold and unfold around every such convolution."""
        convolutions = [node for node in graph_module.graph.nodes if convolves_frames(node)]
        for node in convolutions:
            _flatten(graph_module, node)
        return bool(convolutions)


def _flatten(graph_module: fx.GraphModule, node: fx.Node) -> None:
    graph = graph_module.graph
    source, bias, groups = argument_node(node, 0), argument_of(node, 2, "bias", None), argument_of(node, 6, "groups", 1)
    _, channels, frames, height, width = node_value(source).shape
    shape = [-1, *node_value(node).shape[1:]]
    stored_weight = constant_weight(node, FlattenFrameConvs.id)
    name = str(stored_weight.target)
    buffer = add_buffer(graph_module, f"{name}_2d", read_attribute(graph_module, name).detach().squeeze(-1))
    window = [size[:2] for size in _window(node)]
    with graph.inserting_before(node):
        weight = insert_get_attr(graph_module, buffer, anchor=node)
        flat = insert_call(graph, aten.reshape.default, (source, [-1, channels, frames, height * width]), anchor=node)
        conv = insert_call(graph, aten.conv2d.default, (flat, weight, bias, *window, groups), anchor=node)
        unfolded = insert_call(graph, aten.reshape.default, (conv, shape), anchor=node)
    replace_node(node, unfolded)
    erase_unread_attribute(graph_module, stored_weight)
