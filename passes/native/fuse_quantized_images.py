"""Quantize an image, enlarge it and add its border in one kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_list, argument_node
from tfmq_fx.passes.support.channels_last import (
    NONE,
    Padding,
    channels_last_image,
    is_byte_quantizer,
    quantized_borders,
)
from tfmq_fx.passes.support.nodes import argument_of, insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["FuseQuantizedImages"]

aten = torch.ops.aten
CHANNELS = 16


def _enlargement(node: fx.Node) -> tuple[fx.Node, int]:
    """The image that ``node`` enlarges by whole pixels and how often; ``node`` itself, once, otherwise."""
    if is_call(node, aten.upsample_nearest2d.vec) and len(node.args) > 2 and isinstance(node.args[2], (list, tuple)):
        factors = {float(factor) for factor in argument_list(node, 2)}
        if len(factors) == 1 and (factor := factors.pop()).is_integer():
            return argument_node(node, 0), int(factor)
    return node, 1


def _zero_border(node: fx.Node) -> tuple[fx.Node, Padding]:
    """The image that ``node`` pads with zeros and by how much; ``node`` itself, by nothing, otherwise."""
    if is_call(node, aten.pad.default) and len(border := argument_list(node, 1)) == 4:
        mode, value = argument_of(node, 2, "mode", "constant"), argument_of(node, 3, "value", None)
        if mode == "constant" and not value and min(border) >= 0:
            left, right, top, bottom = border
            return argument_node(node, 0), (top, left, bottom, right)
    return node, NONE


class FuseQuantizedImages(GraphPass):
    """Replace the quantization of an image, with what enlarges or pads it, by one kernel.

    Before::

        %u = upsample_nearest2d(%x, None, [2.0, 2.0])      %q = quantize_per_tensor(%u, s, z, …)
        %l = permute(%q, [0, 2, 3, 1])      %p = constant_pad_nd(%l, [0, 0, w, w, h, h], z)

    After::

        %p = tfmq.quantized_image(permute(%x, [0, 2, 3, 1]), 2, s, z, [h, w, h, w])

    Legality: each pixel is quantized by itself, so it may be quantized before it is repeated; a zero becomes the zero
    point, so a border of zeros before quantizing is one of zero points behind it. Channels are a multiple of 16.
    Numerics are preserved to the bit.
    Meta: the new nodes take the module stack of the quantizer.
    """

    id: ClassVar[str] = "tfmq::fuse_quantized_images"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fuse every byte quantizer of an image that only kernels read."""
        graph, modified = graph_module.graph, False
        for node in [node for node in graph.nodes if is_byte_quantizer(node)]:
            value = node_value(node)
            if value.ndim == 4 and isinstance(value, Tensor) and int(value.shape[1]) % CHANNELS == 0:
                modified |= self._fuse(graph, node)
        if modified:
            graph.eliminate_dead_code()
        return modified

    def _fuse(self, graph: fx.Graph, quantizer: fx.Node) -> bool:
        scale, zero_point = quantizer.args[1:3]
        source, inner = _zero_border(argument_node(quantizer, 0))
        source, times = _enlargement(source)
        if node_value(source).dtype not in (torch.float32, torch.bfloat16):
            return False
        readers = quantized_borders(quantizer)
        for reader, outer in readers:
            padding = [a + b for a, b in zip(inner, outer, strict=True)]
            with graph.inserting_before(quantizer):
                image = channels_last_image(graph, source, quantizer)
                operands = (image, times, scale, zero_point, padding)
                new = insert_call(graph, OPERATORS.quantized_image.default, operands, anchor=quantizer)
            replace_node(reader, new)
        return bool(readers)
