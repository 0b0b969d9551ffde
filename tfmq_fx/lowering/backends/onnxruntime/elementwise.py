"""Arithmetic, comparisons and activation functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tfmq_fx.lowering.backends.onnxruntime.context import OnnxContext
from tfmq_fx.lowering.translation.aten import by_overload
from tfmq_fx.lowering.translation.translator import Operator

__all__ = ["OPERATORS"]


def _unary(operator: str) -> Operator:
    def translate(context: OnnxContext, input: Any) -> Any:
        return context.result(operator, [context.cast(input)])

    return translate


def _binary(operator: str) -> Operator:
    def translate(context: OnnxContext, input: Any, other: Any) -> Any:
        return context.result(operator, [context.cast(input), context.cast(other)])

    return translate


def _scaled(operator: str) -> Operator:
    """``add`` and ``sub``, whose second operand may have a factor."""

    def translate(context: OnnxContext, input: Any, other: Any, alpha: float = 1) -> Any:
        right = context.cast(other)
        if alpha != 1:
            right = context.emit("Mul", [right, context.cast(alpha)], right.shape, right.dtype)
        return context.result(operator, [context.cast(input), right])

    return translate


def _compare(operator: str) -> Operator:
    def translate(context: OnnxContext, input: Any, other: Any) -> Any:
        dtype = context.operand_value(0).dtype
        return context.result(operator, [context.cast(input, dtype), context.cast(other, dtype)])

    return translate


def _reduction(operator: str) -> Operator:
    """A reduction over some axes, or all of them."""

    def translate(context: OnnxContext, input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        value = context.cast(input)
        axes = list(range(len(value.shape))) if dim in (None, []) else [dim] if isinstance(dim, int) else list(dim)
        return context.result(operator, [value, context.builder.sizes(axes)], keepdims=int(keepdim))

    return translate


def to_dtype(context: OnnxContext, input: Any, *_: Any, **__: Any) -> Any:
    """A cast; the dtype is that of the result."""
    return context.cast(input)


def same(context: OnnxContext, input: Any, *_: Any, **__: Any) -> Any:
    """What only concerns memory."""
    return input


def where(context: OnnxContext, condition: Any, input: Any, other: Any) -> Any:
    """An element of the one or of the other."""
    return context.result("Where", [context.value(condition), context.cast(input), context.cast(other)])


def clamp(context: OnnxContext, input: Any, min: Any = None, max: Any = None) -> Any:
    """Clamp to one or both bounds."""
    value = context.cast(input)
    for operator, bound in (("Max", min), ("Min", max)):
        if bound is not None:
            value = context.result(operator, [value, context.cast(bound)])
    return value


def silu(context: OnnxContext, input: Any) -> Any:
    """``x * sigmoid(x)``, which ONNX Runtime fuses."""
    value = context.cast(input)
    return context.result("Mul", [value, context.result("Sigmoid", [value])])


def gelu(context: OnnxContext, input: Any, approximate: str = "none") -> Any:
    """The Gaussian error linear unit, or its approximation by tanh."""
    return context.result("Gelu", [context.cast(input)], approximate=approximate)


def softmax(context: OnnxContext, input: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Softmax along one axis."""
    return context.result("Softmax", [context.cast(input)], axis=dim)


def rsqrt(context: OnnxContext, input: Any) -> Any:
    """One over the square root."""
    return context.result("Reciprocal", [context.result("Sqrt", [context.cast(input)])])


def bitwise_and(context: OnnxContext, input: Any, other: Any) -> Any:
    """Bit by bit; ONNX has an operator of its own for truth values."""
    operator = "And" if context.dtype == torch.bool else "BitwiseAnd"
    return context.result(operator, [context.cast(input), context.cast(other)])


def argmin(context: OnnxContext, input: Any, dim: int, keepdim: bool = False) -> Any:
    """The place of the smallest value along one axis."""
    return context.result("ArgMin", [context.value(input)], axis=dim, keepdims=int(keepdim))


OPERATORS: Mapping[Any, Operator] = by_overload(
    {
        "abs": _unary("Abs"),
        "add": _scaled("Add"),
        "amax": _reduction("ReduceMax"),
        "amin": _reduction("ReduceMin"),
        "argmin": argmin,
        "bitwise_and": bitwise_and,
        "cast": to_dtype,
        "clamp": clamp,
        "cos": _unary("Cos"),
        "div": _binary("Div"),
        "eq": _compare("Equal"),
        "exp": _unary("Exp"),
        "ge": _compare("GreaterOrEqual"),
        "gelu": gelu,
        "gt": _compare("Greater"),
        "le": _compare("LessOrEqual"),
        "log": _unary("Log"),
        "logical_and": _binary("And"),
        "lt": _compare("Less"),
        "maximum": _binary("Max"),
        "mean": _reduction("ReduceMean"),
        "minimum": _binary("Min"),
        "mul": _binary("Mul"),
        "neg": _unary("Neg"),
        "pow": _binary("Pow"),
        "reciprocal": _unary("Reciprocal"),
        "relu": _unary("Relu"),
        "round": _unary("Round"),
        "rsqrt": rsqrt,
        "same": same,
        "sigmoid": _unary("Sigmoid"),
        "silu": silu,
        "sin": _unary("Sin"),
        "softmax": softmax,
        "sqrt": _unary("Sqrt"),
        "sub": _scaled("Sub"),
        "sum": _reduction("ReduceSum"),
        "tanh": _unary("Tanh"),
        "where": where,
    }
)
