"""Run 1×1 convolutions of 16-bit activations on our own kernel, which quantizes them itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.kernels import MAX_SIGNED_PRODUCTS, MOST_WORD, OPERATORS, block_columns, pack_weight
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.byte_quantizers import row_table
from tfmq_fx.passes.support.channels_last import FIRST, LAST, channel_factors, flat_factors
from tfmq_fx.passes.support.integer_convs import integer_weight, pair_of, stored_tensor
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, replace_node
from tfmq_fx.passes.support.predicates import fqn, is_call, node_value

__all__ = ["LowerPointwiseConvs"]

aten = torch.ops.aten
#: What a convolution's arguments are when left out, behind input and weight.
DEFAULTS = (None, 1, 0, 1, 1)
#: The kernel walks input channels by this many values.
CHANNELS = 16
WORDS = (0, MOST_WORD, torch.int32)


@dataclass(frozen=True)
class PointwiseLayer:
    """A 1×1 convolution as the kernel takes it: the image that it quantizes, how, and its constants."""

    image: fx.Node
    quantizer: tuple[Any, ...]
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    @property
    def by_row(self) -> bool:
        """Whether the quantizer is a table and rows, not one pair of numbers."""
        return len(self.quantizer) > 2


def _quantizer(activation: Any) -> tuple[Any, ...] | None:
    """What ``activation`` was quantized to 16 bits and dequantized by: two numbers, or the nodes of a table."""
    if is_call(activation, decomposed.dequantize_per_tensor.default):
        source: Any = activation.args[0]
        same = is_call(source, decomposed.quantize_per_tensor.default) and source.args[1:] == activation.args[1:]
        if not same or activation.args[3:] != WORDS:
            return None
        numbers: Any = activation.args[1:3]
        scale, zero_point = float(numbers[0]), int(numbers[1])
        return (scale, zero_point) if 0 < scale < float("inf") and 0 <= zero_point <= MOST_WORD else None
    if is_call(activation, decomposed.dequantize_per_channel.default):
        source = activation.args[0]
        same = is_call(source, decomposed.quantize_per_channel.default) and source.args[1:] == activation.args[1:]
        table = row_table(activation, WORDS) if same else None
        return None if table is None else (table.scales, table.zero_points, table.rows)
    return None


def find_pointwise_layer(graph_module: fx.GraphModule, node: fx.Node) -> PointwiseLayer | None:
    """``node`` as a layer of the kernel, or None where the kernel does not cover it."""
    if not is_call(node, aten.conv2d.default) or node.kwargs:
        return None
    arguments: list[Any] = list(node.args) + list(DEFAULTS[len(node.args) - 2 :])
    activation, matrix, bias_node, stride, padding, dilation, groups = arguments
    geometry = (pair_of(stride), pair_of(padding), pair_of(dilation), groups)
    if geometry != ((1, 1), (0, 0), (1, 1), 1):
        return None
    quantizer, constants = _quantizer(activation), integer_weight(graph_module, matrix)
    if quantizer is None or constants is None:
        return None
    weight, weight_scale = constants
    bias = torch.zeros(len(weight)) if bias_node is None else stored_tensor(graph_module, bias_node)
    image = argument_node(argument_node(activation, 0), 0)
    fits = node_value(node).dtype == node_value(image).dtype == torch.float32
    fits = fits and list(weight.shape[2:]) == [1, 1] and block_columns(len(weight)) != 0
    fits = fits and weight.shape[1] % CHANNELS == 0 and weight.shape[1] <= MAX_SIGNED_PRODUCTS
    if bias is None or not fits or not bool(weight_scale.isfinite().all() and bias.isfinite().all()):
        return None
    return PointwiseLayer(image, quantizer, weight, weight_scale.float(), bias.float())


class LowerPointwiseConvs(GraphPass):
    """Replace a 1×1 convolution of an image in 16 bits by the kernel that quantizes the image and multiplies.

    Before::

        %q = quantize_per_tensor(%x, s, z, 0, 65535, int32)      %d = dequantize_per_tensor(%q, s, z, …)
        %w = dequantize_per_channel(%i, %c, %zeros, 0, …)        %y = conv2d(%d, %w, %b)

    After::

        %n = tfmq.integer_pointwise_conv(permute(%x, [0, 2, 3, 1]), %packed, %c, %sums, %b, None, s, z, float32)
        %y = permute(%n, [0, 3, 1, 2])

    Where each item has a row of a table (``quantize_per_channel`` along the batch), ``integer_pointwise_conv.rows``
    takes the table and the rows. Where the channels are multiplied by stored factors before (``mul(%x, %f)``), these
    are the last argument.

    Legality: the kernel quantizes each value as the quantizer does and sums the products of its two bytes in integers;
    what the zero point adds is taken off in integers too. The kernel of the convolution is one pixel, stride 1, without
    padding, dilation or groups; activations are 0 to 65535, weights int8 with zero point 0, channels a multiple of 16,
    and no sum of a byte's products can pass an int32. Numerics are preserved up to float rounding.
    Meta: the new nodes take the module stack of the layer.
    """

    id: ClassVar[str] = "tfmq::lower_pointwise_convs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every layer that the kernel covers."""
        candidates = [(node, find_pointwise_layer(graph_module, node)) for node in graph_module.graph.nodes]
        layers = [(node, layer) for node, layer in candidates if layer is not None]
        for node, layer in layers:
            self._replace(graph_module, node, layer)
        if layers:
            graph_module.graph.eliminate_dead_code()
        return bool(layers)

    def _replace(self, graph_module: fx.GraphModule, node: fx.Node, layer: PointwiseLayer) -> None:
        graph, name = graph_module.graph, fqn(node)
        buffers = {
            "packed": pack_weight(layer.weight),
            "scale": layer.weight_scale,
            "sum": layer.weight.sum((1, 2, 3), dtype=torch.int32),
            "bias": layer.bias,
        }
        names = [add_buffer(graph_module, f"{name}_{key}", value) for key, value in buffers.items()]
        operator = OPERATORS.integer_pointwise_conv.rows if layer.by_row else OPERATORS.integer_pointwise_conv.default
        source, factors = channel_factors(layer.image)
        with graph.inserting_before(node):
            image = insert_call(graph, aten.permute.default, (source, LAST), anchor=node)
            operands = [insert_get_attr(graph_module, constant, anchor=node) for constant in names]
            arguments = (image, *operands, None, *layer.quantizer, torch.float32)
            arguments += tuple(flat_factors(graph, factors, node))
            new = insert_call(graph, operator, arguments, anchor=node)
            new = insert_call(graph, aten.permute.default, (new, FIRST), anchor=node)
        replace_node(node, new, results=False)
