"""Run quantized convolutions and linears on our own integer kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.kernels import MAX_SIGNED_PRODUCTS, MAX_TAPS, OPERATORS, block_columns, pack_weight
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.byte_quantizers import RowTable, row_table
from tfmq_fx.passes.support.integer_convs import integer_weight, pair_of, stored_tensor
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, replace_node
from tfmq_fx.passes.support.predicates import fqn, is_call, node_value

__all__ = ["LowerIntegerConvs"]

aten = torch.ops.aten
#: What a convolution's arguments are when left out, behind input and weight.
DEFAULTS = (None, 1, 0, 1, 1)
#: The kernel walks input channels by this many bytes.
CHANNELS = 16


@dataclass(frozen=True)
class IntegerLayer:
    """A quantized layer as the kernel takes it: its uint8 activation, its int8 weight ``[K, C, h, w]``, the rest."""

    quantized: fx.Node
    one: tuple[float, int] | None
    table: RowTable | None
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]


def find_integer_layer(graph_module: fx.GraphModule, node: fx.Node) -> IntegerLayer | None:
    """``node`` as a layer of the integer kernel, or None where the kernel does not cover it."""
    if not is_call(node, aten.conv2d.default, aten.linear.default) or node.kwargs:
        return None
    arguments: list[Any] = list(node.args) + list(DEFAULTS[len(node.args) - 2 :])
    activation, matrix, bias_node, *geometry = arguments
    one, table = _shared_quantizer(activation), row_table(activation)
    if one is None and table is None:
        return None
    if (constants := integer_weight(graph_module, matrix)) is None:
        return None
    weight, weight_scale = constants
    bias = None if bias_node is None else stored_tensor(graph_module, bias_node)
    stride, padding, dilation, groups = pair_of(geometry[0]), pair_of(geometry[1]), pair_of(geometry[2]), geometry[3]
    if (bias is None) != (bias_node is None) or stride is None or padding is None or (dilation, groups) != ((1, 1), 1):
        return None
    value = node_value(argument_node(activation, 0))
    linear = is_call(node, aten.linear.default)
    if value.ndim != (2 if linear else 4) or node_value(node).dtype != torch.float32:
        return None
    weight = weight[:, :, None, None] if linear else weight
    taps = weight.shape[2] * weight.shape[3]
    if block_columns(weight.shape[0]) == 0 or weight.shape[1] % CHANNELS or taps > MAX_TAPS:
        return None
    if weight.shape[1] * taps > MAX_SIGNED_PRODUCTS:  # the kernel adds them up in an int32, which wraps
        return None
    # What is not finite would be lost where the kernel's result is quantized or rounded.
    finite = all(bool(value.isfinite().all()) for value in (weight_scale, *([] if bias is None else [bias])))
    if not finite or (table is not None and padding != (0, 0) and not _may_pad_before(activation, table)):
        return None
    quantized = argument_node(activation, 0)
    return IntegerLayer(quantized, one, table, weight, weight_scale, bias, stride, padding)


def _shared_quantizer(node: Any) -> tuple[float, int] | None:
    """Scale and zero point by which ``node`` dequantizes all bytes."""
    if not is_call(node, decomposed.dequantize_per_tensor.default) or node.args[5] != torch.uint8:
        return None
    numbers: Any = node.args[1:3]
    return (float(numbers[0]), int(numbers[1])) if 0 <= numbers[1] <= 255 else None  # a border is written in bytes


def _may_pad_before(activation: fx.Node, table: RowTable) -> bool:
    """Whether zeros before the quantizer of ``activation`` become the zero points that it dequantizes to zeros."""
    source = argument_node(activation, 0)
    if not is_call(source, decomposed.quantize_per_channel.default) or source.args[1:] != activation.args[1:]:
        return False
    bounds: Any = source.args[4:6]
    zero_points = table.values()[1]
    return bool(((zero_points >= bounds[0]) & (zero_points <= bounds[1])).all())


def _fold(layer: IntegerLayer, shared: tuple[float, int]) -> dict[str, Tensor]:
    """The kernel's scale, and its bias with what the activation's zero point adds to every sum taken off."""
    scale = layer.weight_scale.double() * shared[0]
    sums = layer.weight.sum((1, 2, 3), dtype=torch.float64)
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
    return {"scale": scale.float(), "bias": (bias - scale * sums * shared[1]).float()}


def _constants(layer: IntegerLayer) -> dict[str, Tensor]:
    """What the kernel scales by where each item has a row of the table."""
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.float()
    sums = layer.weight.sum((1, 2, 3), dtype=torch.int32)
    return {"scale": layer.weight_scale.float(), "sum": sums, "bias": bias}


class LowerIntegerConvs(GraphPass):
    """Replace a convolution or linear of dequantized integers by the integer kernel.

    Before::

        %x = dequantize_per_tensor(%q, s, z, …)      %w = dequantize_per_channel(%i, %c, %zeros, 0, …)
        %y = conv2d(%x, %w, %b, stride, padding)

    After::

        %l = permute(%q, [0, 2, 3, 1])      %p = constant_pad_nd(%l, [0, 0, w, w, h, h], z)
        %n = tfmq.integer_conv(%p, %packed, s * c, %folded, None, kernel, stride, float32)
        %y = permute(%n, [0, 3, 1, 2])

    A linear of ``[R, C]`` is the convolution of ``R`` images of one pixel. Where each item has a row of a table
    (``dequantize_per_channel`` along the batch, scales and zero points gathered)::

        %p = constant_pad_nd(%x, [w, w, h, h], 0.0)      %q = quantize_per_channel(%p, %s, %z, 0, …)
        %n = tfmq.integer_conv.rows(permute(%q), %packed, %c, %sums, %b, None, %scales, %zeros, %rows, …)

    Legality: the kernel computes the same sum in integers and scales it once. A border of zero points stands for
    zeros, so a border of zeros may be quantized; what the zero point adds to a sum, ``z * sum(w)``, is a constant of
    the channel and goes into the bias, or with a table is taken off by the kernel.
    Activations are uint8 by one pair of numbers or by rows, weights int8 with zero point 0, channels a multiple of
    16, and no sum of products can pass an int32.
    Numerics are preserved up to float rounding.
    Meta: the new nodes take the module stack of the layer.
    """

    id: ClassVar[str] = "tfmq::lower_integer_convs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every layer that the kernel covers."""
        candidates = [(node, find_integer_layer(graph_module, node)) for node in graph_module.graph.nodes]
        layers = [(node, layer) for node, layer in candidates if layer is not None]
        for node, layer in layers:
            self._replace(graph_module, node, layer)
        if layers:
            graph_module.graph.eliminate_dead_code()
        return bool(layers)

    def _replace(self, graph_module: fx.GraphModule, node: fx.Node, layer: IntegerLayer) -> None:
        graph, name = graph_module.graph, fqn(node)
        constants = _constants(layer) if layer.one is None else _fold(layer, layer.one)
        buffers = {"packed": pack_weight(layer.weight), **constants}
        names = [add_buffer(graph_module, f"{name}_{key}", value) for key, value in buffers.items()]
        depth, kernel = int(layer.weight.shape[1]), list(layer.weight.shape[2:])
        linear, operator = is_call(node, aten.linear.default), OPERATORS.integer_conv
        with graph.inserting_before(node):
            quantized = layer.quantized if layer.table is None else self._padded(graph, layer, node)
            if linear:
                image = insert_call(graph, aten.reshape.default, (quantized, [-1, 1, 1, depth]), anchor=node)
            else:
                image = insert_call(graph, aten.permute.default, (quantized, [0, 2, 3, 1]), anchor=node)
            operands = [insert_get_attr(graph_module, constant, anchor=node) for constant in names]
            rest = (kernel, list(layer.stride), torch.float32)
            if layer.table is None:
                image = self._pad(graph, image, layer, node)
                new = insert_call(graph, operator.default, (image, *operands, None, *rest), anchor=node)
            else:
                table = (layer.table.scales, layer.table.zero_points, layer.table.rows)
                new = insert_call(graph, operator.rows, (image, *operands, None, *table, *rest), anchor=node)
            back: tuple[Any, Sequence[int]] = (
                (aten.reshape.default, [-1, len(layer.weight)]) if linear else (aten.permute.default, [0, 3, 1, 2])
            )
            new = insert_call(graph, back[0], (new, list(back[1])), anchor=node)
        replace_node(node, new, results=False)

    def _pad(self, graph: fx.Graph, image: fx.Node, layer: IntegerLayer, anchor: fx.Node) -> fx.Node:
        height, width = layer.padding
        if not (height or width) or layer.one is None:
            return image
        border = [0, 0, width, width, height, height]
        return insert_call(graph, aten.constant_pad_nd.default, (image, border, layer.one[1]), anchor=anchor)

    def _padded(self, graph: fx.Graph, layer: IntegerLayer, anchor: fx.Node) -> fx.Node:
        """The quantized activation of a layer with a table; a border differs by item, so it is quantized with it."""
        height, width = layer.padding
        if not (height or width):
            return layer.quantized
        border = [width, width, height, height]
        source = argument_node(layer.quantized, 0)
        padded = insert_call(graph, aten.constant_pad_nd.default, (source, border, 0.0), anchor=anchor)
        arguments = (padded, *layer.quantized.args[1:])
        return insert_call(graph, decomposed.quantize_per_channel.default, arguments, anchor=anchor)
