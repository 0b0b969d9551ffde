"""Convolutions, linears, products, norms and resampling; integers go to ONNX's integer operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tfmq_fx.lowering.backends.onnxruntime.context import OnnxContext
from tfmq_fx.lowering.backends.onnxruntime.graph import Value
from tfmq_fx.lowering.backends.onnxruntime.integers import INTEGERS, IntegerActivation, IntegerWeight
from tfmq_fx.lowering.translation.aten import by_overload, per_axis
from tfmq_fx.lowering.translation.translator import Operator

__all__ = ["OPERATORS"]


def _fits(input: Any, weight: Any) -> bool:
    """Whether both operands are 8-bit integers."""
    return (
        isinstance(input, IntegerActivation)
        and isinstance(weight, IntegerWeight)
        and {input.integers.dtype, weight.integers.dtype} <= set(INTEGERS)
    )


def _restore(context: OnnxContext, sums: Value, scales: Any) -> Value:
    """Integer sums times the scales of their operands."""
    real = context.emit("Cast", [sums], sums.shape, torch.float32, to=1)
    return context.emit("Mul", [real, context.constant(scales)], sums.shape, torch.float32)


def _add_bias(context: OnnxContext, result: Value, bias: Any, axis: int) -> Value:
    if bias is None:
        return result
    along = [1] * len(context.shape)
    along[axis] = -1
    return context.result("Add", [result, context.constant(bias.reshape(along))])


def conv(context: OnnxContext, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
         dilation: Any = 1, groups: int = 1) -> Any:  # fmt: skip
    """A 1-d, 2-d or 3-d convolution."""
    axes = len(context.shape) - 2
    border = per_axis(padding, axes)
    options = {
        "strides": per_axis(stride, axes),
        "pads": [*border, *border],
        "dilations": per_axis(dilation, axes),
        "group": groups,
    }
    if not _fits(input, weight):
        inputs = [context.value(input), context.value(weight), None if bias is None else context.constant(bias)]
        return context.result("Conv", inputs[: 2 if bias is None else 3], **options)
    operands = [input.integers, context.constant(weight.integers), input.zero_point]
    sums = context.emit("ConvInteger", operands, context.shape, torch.int32, name=context.node.name, **options)
    along = [1, -1, *([1] * axes)]
    return _add_bias(context, _restore(context, sums, (weight.scales * input.scale).reshape(along)), bias, 1)


def linear(context: OnnxContext, input: Any, weight: Any, bias: Any = None) -> Any:
    """A linear layer."""
    if not _fits(input, weight):
        matrix = weight.real if isinstance(weight, IntegerWeight) else weight
        product = context.result("MatMul", [context.value(input), context.value(matrix.t())])
        return _add_bias(context, product, bias, -1)
    operands = [input.integers, context.constant(weight.integers.t()), input.zero_point]
    sums = context.emit("MatMulInteger", operands, context.shape, torch.int32, name=context.node.name)
    return _add_bias(context, _restore(context, sums, weight.scales * input.scale), bias, -1)


def matmul(context: OnnxContext, input: Any, other: Any) -> Any:
    """A product of two activations."""
    both = (input, other)
    if not all(isinstance(x, IntegerActivation) and x.integers.dtype in INTEGERS for x in both):
        return context.result("MatMul", [context.value(input), context.value(other)])
    operands = [x.integers for x in both] + [x.zero_point for x in both]
    sums = context.emit("MatMulInteger", operands, context.shape, torch.int32, name=context.node.name)
    return _restore(context, sums, torch.tensor(input.scale * other.scale))


def einsum(context: OnnxContext, equation: str, tensors: Sequence[Any], *_: Any, **__: Any) -> Any:
    """A sum of products in Einstein's notation."""
    return context.result("Einsum", [context.value(tensor) for tensor in tensors], equation=equation.replace(" ", ""))


def attention(context: OnnxContext, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, **_: Any) -> Any:  # fmt: skip
    """Scaled dot product attention in its parts."""
    q, k, v = (context.value(x) for x in (query, key, value))
    order = [*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2]
    turned = context.emit("Transpose", [k], [k.shape[axis] for axis in order], k.dtype, perm=order)
    factor = context.number(scale if scale is not None else q.shape[-1] ** -0.5)
    shape = [*context.shape[:-1], k.shape[-2]]
    scaled = context.emit("Mul", [q, factor], q.shape, q.dtype)
    scores = context.emit("MatMul", [scaled, turned], shape, q.dtype)
    mask = context.value(attn_mask) if attn_mask is not None else None
    if is_causal:
        mask = context.constant(torch.full(shape[-2:], float("-inf")).triu(1))
    if mask is not None and mask.dtype == torch.bool:
        bounds = [context.number(0.0), context.number(float("-inf"))]
        mask = context.emit("Where", [mask, *bounds], mask.shape, q.dtype)
    if mask is not None:
        scores = context.emit("Add", [scores, mask], shape, q.dtype)
    weights = context.emit("Softmax", [scores], shape, q.dtype, axis=-1)
    return context.result("MatMul", [weights, v])


def group_norm(context: OnnxContext, input: Any, num_groups: int, weight: Any = None, bias: Any = None,
               eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    """Group normalization: instance normalization of the groups, then the factors of the channels."""
    shape = context.shape
    grouped = [shape[0], num_groups, -1]
    sizes = [*grouped[:2], int(torch.Size(shape).numel() // (shape[0] * num_groups))]
    value = context.emit("Reshape", [context.value(input), context.builder.sizes(grouped)], sizes, context.dtype)
    ones, zeros = context.constant(torch.ones(num_groups)), context.constant(torch.zeros(num_groups))
    normal = context.emit("InstanceNormalization", [value, ones, zeros], sizes, context.dtype, epsilon=eps)
    result = context.result("Reshape", [normal, context.builder.sizes(shape)])
    along = [1, -1, *([1] * (len(shape) - 2))]
    for operator, factor in (("Mul", weight), ("Add", bias)):
        if factor is not None:
            result = context.result(operator, [result, context.constant(factor.reshape(along))])
    return result


def layer_norm(context: OnnxContext, input: Any, normalized_shape: Sequence[int], weight: Any = None,
               bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:  # fmt: skip
    """Layer normalization over the last axes."""
    factor = context.value(torch.ones(list(normalized_shape)) if weight is None else weight)
    inputs = [context.cast(input), factor, *([] if bias is None else [context.value(bias)])]
    return context.result("LayerNormalization", inputs, axis=-len(normalized_shape), epsilon=eps)


def upsample_nearest(context: OnnxContext, input: Any, *_: Any, **__: Any) -> Any:
    """Nearest values on a larger grid."""
    return context.result(
        "Resize", [context.value(input), None, None, context.builder.sizes(context.shape)],
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def average_pool(context: OnnxContext, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
                 ceil_mode: bool = False, count_include_pad: bool = True, *_: Any) -> Any:  # fmt: skip
    """Averages of windows."""
    axes = len(context.shape) - 2
    kernel, border = per_axis(kernel_size, axes), per_axis(padding, axes)
    return context.result(
        "AveragePool", [context.value(input)], kernel_shape=kernel, strides=per_axis(stride or kernel, axes),
        pads=[*border, *border], ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
    )  # fmt: skip


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
