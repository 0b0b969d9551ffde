"""Arithmetic, comparisons, activation functions and casts, with the element types that they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from openvino import Type
from openvino import opset15 as opset

from tfmq_fx.lowering.translation.aten import by_overload
from tfmq_fx.lowering.translation.translator import Operator, Translator

__all__ = ["OPERATORS", "element_type"]

#: OpenVINO's element types by dtype.
ELEMENT_TYPES = {
    torch.float32: Type.f32,
    torch.float64: Type.f64,
    torch.float16: Type.f16,
    torch.bfloat16: Type.bf16,
    torch.int64: Type.i64,
    torch.int32: Type.i32,
    torch.int16: Type.i16,
    torch.int8: Type.i8,
    torch.uint8: Type.u8,
    torch.bool: Type.boolean,
}


def element_type(dtype: torch.dtype) -> Any:
    """OpenVINO's element type of a dtype."""
    return ELEMENT_TYPES[dtype]


def _unary(function: Callable[[Any], Any]) -> Operator:
    def translate(context: Translator, input: Any) -> Any:
        return function(cast(context, input)).output(0)

    return translate


def cast(context: Translator, x: Any, dtype: torch.dtype | None = None) -> Any:
    """``x`` in ``dtype``, by default that of the result."""
    element = element_type(dtype or context.dtype)
    value = context.value(x, dtype)
    return value if value.get_element_type() == element else opset.convert(value, element).output(0)


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


def _reduction(function: Callable[..., Any]) -> Operator:
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
    index = opset.topk(value, 1, axis, "min", "none", "i64").output(1)
    return index if keepdim else opset.squeeze(index, [axis]).output(0)


OPERATORS: Mapping[Any, Operator] = by_overload(
    {
        "abs": _unary(opset.abs),
        "add": _scaled(opset.add),
        "amax": _reduction(opset.reduce_max),
        "amin": _reduction(opset.reduce_min),
        "argmin": argmin,
        "bitwise_and": _binary(opset.bitwise_and),
        "cast": to_dtype,
        "clamp": clamp,
        "cos": _unary(opset.cos),
        "div": _binary(opset.divide),
        "eq": _compare(opset.equal),
        "exp": _unary(opset.exp),
        "ge": _compare(opset.greater_equal),
        "gelu": gelu,
        "gt": _compare(opset.greater),
        "le": _compare(opset.less_equal),
        "log": _unary(opset.log),
        "logical_and": _binary(opset.logical_and),
        "lt": _compare(opset.less),
        "maximum": _binary(opset.maximum),
        "mean": _reduction(opset.reduce_mean),
        "minimum": _binary(opset.minimum),
        "mul": _binary(opset.multiply),
        "neg": _unary(opset.negative),
        "pow": _binary(opset.power),
        "reciprocal": reciprocal,
        "relu": _unary(opset.relu),
        "round": _unary(opset.round),
        "rsqrt": rsqrt,
        "same": same,
        "sigmoid": _unary(opset.sigmoid),
        "silu": _unary(opset.swish),
        "sin": _unary(opset.sin),
        "softmax": softmax,
        "sqrt": _unary(opset.sqrt),
        "sub": _scaled(opset.subtract),
        "sum": _reduction(opset.reduce_sum),
        "tanh": _unary(opset.tanh),
        "where": where,
    }
)
