"""Convolutions, linears, products, norms and resampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from openvino import opset15 as opset
from torch import Tensor

from tfmq_fx.lowering.backends.openvino.elementwise import cast
from tfmq_fx.lowering.translation.aten import by_overload, per_axis
from tfmq_fx.lowering.translation.translator import Operator, Translator

__all__ = ["OPERATORS"]

#: From this many pixels on, group normalization in parts is faster than in one.
PIXELS_FOR_PARTS = 256


def _named(context: Translator, node: Any) -> Any:
    """Name the operator after its node, so that it is found in what the engine compiled."""
    node.set_friendly_name(context.node.name)
    return node.output(0)


def _add_bias(context: Translator, result: Any, bias: Any, axis: int) -> Any:
    if bias is None:
        return result
    along = [1] * len(context.shape)
    along[axis] = -1
    return opset.add(result, context.constant(bias.reshape(along))).output(0)


def conv(context: Translator, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
         dilation: Any = 1, groups: int = 1) -> Any:  # fmt: skip
    """A 1-d, 2-d or 3-d convolution."""
    axes = len(context.shape) - 2
    steps = [per_axis(value, axes) for value in (stride, padding, padding, dilation)]
    kernel = context.value(weight)
    if groups == 1:
        return _add_bias(context, _named(context, opset.convolution(context.value(input), kernel, *steps)), bias, 1)
    shape = list(kernel.get_shape())
    grouped = opset.reshape(kernel, [groups, shape[0] // groups, *shape[1:]], special_zero=False)
    return _add_bias(context, _named(context, opset.group_convolution(context.value(input), grouped, *steps)), bias, 1)


def linear(context: Translator, input: Any, weight: Any, bias: Any = None) -> Any:
    """A linear layer."""
    product = opset.matmul(context.value(input), context.value(weight), False, True)
    return _add_bias(context, _named(context, product), bias, -1)


def matmul(context: Translator, input: Any, other: Any) -> Any:
    """A product of two activations."""
    return _named(context, opset.matmul(context.value(input), context.value(other), False, False))


def einsum(context: Translator, equation: str, tensors: Sequence[Any], *_: Any, **__: Any) -> Any:
    """A sum of products in Einstein's notation."""
    return opset.einsum([context.value(tensor) for tensor in tensors], equation.replace(" ", "")).output(0)


def attention(context: Translator, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, **_: Any) -> Any:  # fmt: skip
    """Scaled dot product attention, fused."""
    mask = None if attn_mask is None else context.value(attn_mask)
    factor = None if scale is None else cast(context, scale)
    inputs = [context.value(x) for x in (query, key, value)]
    return opset.scaled_dot_product_attention(*inputs, mask, factor, is_causal).output(0)


def group_norm(context: Translator, input: Any, num_groups: int, weight: Any = None, bias: Any = None,
               eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    """Group normalization: of images from a size on in parts, else in one."""
    channels = context.shape[1]
    factors = torch.ones(channels) if weight is None else weight
    shifts = torch.zeros(channels) if bias is None else bias
    image = context.shape[2:]
    if len(image) < 2 or math.prod(image) < PIXELS_FOR_PARTS:
        constants = context.constant(factors), context.constant(shifts)
        return opset.group_normalization(context.value(input), *constants, num_groups, eps).output(0)
    return _group_norm_in_parts(context, context.value(input), num_groups, factors, shifts, eps)


def _group_norm_in_parts(context: Translator, value: Any, num_groups: int, factors: Tensor, shifts: Tensor,
                         eps: float) -> Any:  # fmt: skip
    """Means over the image, then over the channels of a group.

    ``GroupNormalization`` itself becomes a reshape to groups, which turns images from channels-last, as the integer
    convolutions have them, to channels-first and back again. In parts, nothing is turned, and what follows the
    statistics is one loop with the activation and the quantization behind it.
    """
    shape = context.shape
    batch, channels = shape[:2]
    image = list(range(2, len(shape)))
    along = [1, -1, *[1] * len(image)]
    grouped, wide = [batch, num_groups, channels // num_groups], [batch, channels, *[1] * len(image)]

    def mean(x: Any) -> Any:
        """The mean of each group."""
        means = opset.reshape(opset.reduce_mean(x, image, True), grouped, special_zero=False)
        return opset.reduce_mean(means, [2], True)

    def per_channel(x: Any, each: Tensor) -> Any:
        """A value of each group times a factor of each of its channels."""
        product = opset.multiply(x, context.constant(each.reshape(1, *grouped[1:])))
        return opset.reshape(product, wide, special_zero=False)

    centred = opset.subtract(value, per_channel(mean(value), torch.ones(channels)))
    variance = mean(opset.multiply(centred, centred))
    inverse = opset.power(opset.add(variance, cast(context, eps)), cast(context, -0.5))
    result = opset.multiply(centred, per_channel(inverse, factors))
    return opset.add(result, context.constant(shifts.reshape(along))).output(0)


def layer_norm(context: Translator, input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
               eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    """Layer normalization over the last axes."""
    rank = len(context.shape)
    axes = opset.constant([rank - 1 - n for n in range(len(normalized_shape))])
    result = opset.mvn(context.value(input), axes, True, eps, "INSIDE_SQRT").output(0)
    if weight is not None:
        result = opset.multiply(result, context.value(weight)).output(0)
    return result if bias is None else opset.add(result, context.value(bias)).output(0)


def upsample_nearest(context: Translator, input: Any, *_: Any, **__: Any) -> Any:
    """Nearest values on a larger grid."""
    axes = list(range(2, len(context.shape)))
    return opset.interpolate(
        context.value(input), context.shape[2:], "nearest", "sizes",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor", axes=opset.constant(axes),
    ).output(0)  # fmt: skip


def average_pool(context: Translator, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
                 ceil_mode: bool = False, count_include_pad: bool = True, *_: Any) -> Any:  # fmt: skip
    """Averages of windows."""
    axes = len(context.shape) - 2
    kernel = per_axis(kernel_size, axes)
    steps, border = per_axis(stride or kernel, axes), per_axis(padding, axes)
    rounding = "ceil" if ceil_mode else "floor"
    pooled = opset.avg_pool(context.value(input), steps, border, border, kernel, not count_include_pad, rounding)
    return pooled.output(0)


OPERATORS: Mapping[Any, Operator] = by_overload(
    {
        "average_pool": average_pool,
        "conv": conv,
        "einsum": einsum,
        "group_norm": group_norm,
        "layer_norm": layer_norm,
        "linear": linear,
        "matmul": matmul,
        "scaled_dot_product_attention": attention,
        "upsample_nearest": upsample_nearest,
    }
)
