"""Arithmetic, comparisons and activation functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from openvino import opset15 as opset

from tfmq_fx.lowering.openvino.types import element_type
from tfmq_fx.lowering.translation import Operator, Translator

__all__ = ["OPERATORS"]

aten = torch.ops.aten


def _unary(function: Callable[[Any], Any]) -> Operator:
    def translate(context: Translator, input: Any) -> Any:
        return function(cast(context, input)).output(0)

    return translate


def cast(context: Translator, x: Any, dtype: torch.dtype | None = None) -> Any:
    """``x`` in ``dtype``, by default that of the result."""
    wanted = element_type(dtype or context.dtype)
    value = context.value(x, dtype)
    return value if value.get_element_type() == wanted else opset.convert(value, wanted).output(0)


def _binary(function: Callable[[Any, Any], Any]) -> Operator:
    def translate(context: Translator, input: Any, other: Any) -> Any:
        return function(cast(context, input), cast(context, other)).output(0)

    return translate


def _scaled(function: Callable[[Any, Any], Any]) -> Operator:
    """``add`` and ``sub``, whose second operand may have a factor."""

    def translate(context: Translator, input: Any, other: Any, alpha: float = 1) -> Any:
        right = cast(context, other)
        if alpha != 1:
            right = opset.multiply(right, cast(context, alpha))
        return function(cast(context, input), right).output(0)

    return translate


def _compare(function: Callable[[Any, Any], Any]) -> Operator:
    def translate(context: Translator, input: Any, other: Any) -> Any:
        dtype = context.operand_value(0).dtype
        return function(cast(context, input, dtype), cast(context, other, dtype)).output(0)

    return translate


def to_dtype(context: Translator, input: Any, *_: Any, **__: Any) -> Any:
    """A cast; the dtype is that of the result."""
    return cast(context, input)


def same(context: Translator, input: Any, *_: Any, **__: Any) -> Any:
    """What only concerns memory."""
    return context.value(input)


def where(context: Translator, condition: Any, input: Any, other: Any) -> Any:
    """An element of the one or of the other."""
    return opset.select(context.value(condition), cast(context, input), cast(context, other)).output(0)


def clamp(context: Translator, input: Any, min: Any = None, max: Any = None) -> Any:
    """Clamp to one or both bounds."""
    value = cast(context, input)
    if min is not None:
        value = opset.maximum(value, cast(context, min)).output(0)
    return value if max is None else opset.minimum(value, cast(context, max)).output(0)


def clamp_min(context: Translator, input: Any, min: Any) -> Any:
    """Clamp from below."""
    return clamp(context, input, min)


def gelu(context: Translator, input: Any, approximate: str = "none") -> Any:
    """The Gaussian error linear unit, or its approximation by tanh."""
    return opset.gelu(context.value(input), "erf" if approximate == "none" else "tanh").output(0)


def softmax(context: Translator, input: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Softmax along one axis."""
    return opset.softmax(cast(context, input), dim % len(context.shape)).output(0)


def reciprocal(context: Translator, input: Any) -> Any:
    """One over the input."""
    return opset.divide(cast(context, 1), cast(context, input)).output(0)


def rsqrt(context: Translator, input: Any) -> Any:
    """One over the square root."""
    return opset.divide(cast(context, 1), opset.sqrt(cast(context, input))).output(0)


def reduction(function: Callable[..., Any]) -> Operator:
    """A reduction over some axes, or all of them."""

    def translate(context: Translator, input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        value = cast(context, input)
        rank = len(value.get_shape())
        axes = list(range(rank)) if dim in (None, []) else [dim] if isinstance(dim, int) else list(dim)
        return function(value, [axis % rank for axis in axes], keepdim).output(0)

    return translate


def argmin(context: Translator, input: Any, dim: int, keepdim: bool = False) -> Any:
    """The place of the smallest value along one axis."""
    value = context.value(input)
    axis = dim % len(value.get_shape())
    found = opset.topk(value, 1, axis, "min", "none", "i64").output(1)
    return found if keepdim else opset.squeeze(found, [axis]).output(0)


OPERATORS: Mapping[Any, Operator] = {
    aten.abs.default: _unary(opset.abs),
    aten.cos.default: _unary(opset.cos),
    aten.exp.default: _unary(opset.exp),
    aten.log.default: _unary(opset.log),
    aten.neg.default: _unary(opset.negative),
    aten.relu.default: _unary(opset.relu),
    aten.round.default: _unary(opset.round),
    aten.sigmoid.default: _unary(opset.sigmoid),
    aten.silu.default: _unary(opset.swish),
    aten.sin.default: _unary(opset.sin),
    aten.sqrt.default: _unary(opset.sqrt),
    aten.tanh.default: _unary(opset.tanh),
    aten.reciprocal.default: reciprocal,
    aten.rsqrt.default: rsqrt,
    aten.add.Tensor: _scaled(opset.add),
    aten.sub.Tensor: _scaled(opset.subtract),
    aten.mul.Tensor: _binary(opset.multiply),
    aten.mul.Scalar: _binary(opset.multiply),
    aten.div.Tensor: _binary(opset.divide),
    aten.maximum.default: _binary(opset.maximum),
    aten.minimum.default: _binary(opset.minimum),
    aten.pow.Tensor_Scalar: _binary(opset.power),
    aten.bitwise_and.Tensor: _binary(opset.logical_and),
    aten.logical_and.default: _binary(opset.logical_and),
    aten.eq.Scalar: _compare(opset.equal),
    aten.eq.Tensor: _compare(opset.equal),
    aten.ge.Scalar: _compare(opset.greater_equal),
    aten.gt.Scalar: _compare(opset.greater),
    aten.le.Scalar: _compare(opset.less_equal),
    aten.le.Tensor: _compare(opset.less_equal),
    aten.lt.Scalar: _compare(opset.less),
    aten.to.dtype: to_dtype,
    aten._to_copy.default: to_dtype,
    aten.clone.default: same,
    aten.contiguous.default: same,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp_min,
    aten.gelu.default: gelu,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.where.self: where,
    aten.where.ScalarOther: where,
    aten.where.ScalarSelf: where,
    aten.where.Scalar: where,
    aten.mean.dim: reduction(opset.reduce_mean),
    aten.sum.dim_IntList: reduction(opset.reduce_sum),
    aten.amax.default: reduction(opset.reduce_max),
    aten.amin.default: reduction(opset.reduce_min),
    aten.argmin.default: argmin,
}
