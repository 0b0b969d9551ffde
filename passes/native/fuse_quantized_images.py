"""Quantize an image, enlarge it and add its border in one kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_list, argument_node
from tfmq_fx.passes.support.byte_quantizers import ByteQuantizer, byte_quantizer
from tfmq_fx.passes.support.channels_last import (
    channels_last_image,
    flat_factors,
    quantized_borders,
    scaled_border,
)
from tfmq_fx.passes.support.nodes import insert_call, replace_node
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


class FuseQuantizedImages(GraphPass):
    """Replace the quantization of an image, with what enlarges or pads it, by one kernel.

    Before::

        %u = upsample_nearest2d(%x, None, [2.0, 2.0])      %q = quantize_per_tensor(%u, s, z, …)
        %l = permute(%q, [0, 2, 3, 1])      %p = constant_pad_nd(%l, [0, 0, w, w, h, h], z)

    After::

        %p = tfmq.quantized_image(permute(%x, [0, 2, 3, 1]), 2, s, z, [h, w, h, w])

    Where each item has a row of a table, ``quantized_image.rows`` takes the table and the rows. Where the channels are
    multiplied by stored factors before (``mul(%u, %f)``, on either side of the border), these are the last argument.

    Legality: each pixel is scaled and quantized by itself, so that may be done before it is repeated; a zero becomes
    the zero point, so a border of zeros before quantizing is one of zero points behind it. Channels are a multiple of
    16. Numerics are preserved to the bit.
    Meta: the new nodes take the module stack of the quantizer.
    """

    id: ClassVar[str] = "tfmq::fuse_quantized_images"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fuse every byte quantizer of an image that only kernels read."""
        graph, modified = graph_module.graph, False
        for quantizer in [found for node in graph.nodes if (found := byte_quantizer(node)) is not None]:
            value = node_value(quantizer.node)
            if value.ndim == 4 and isinstance(value, Tensor) and int(value.shape[1]) % CHANNELS == 0:
                modified |= self._fuse(graph, quantizer)
        if modified:
            graph.eliminate_dead_code()
        return modified

    def _fuse(self, graph: fx.Graph, quantizer: ByteQuantizer) -> bool:
        node = quantizer.node
        source, inner, factors = scaled_border(argument_node(node, 0))
        source, times = _enlargement(source)
        if node_value(source).dtype not in (torch.float32, torch.bfloat16):
            return False
        operator = OPERATORS.quantized_image
        readers = quantized_borders(quantizer)
        for reader, outer in readers:
            padding = [a + b for a, b in zip(inner, outer, strict=True)]
            with graph.inserting_before(node):
                image = channels_last_image(graph, source, node)
                operands = (image, times, *quantizer.operands, padding, *flat_factors(graph, factors, node))
                chosen = operator.default if quantizer.table is None else operator.rows
                new = insert_call(graph, chosen, operands, anchor=node)
            replace_node(reader, new)
        return bool(readers)
