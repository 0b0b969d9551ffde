"""Arithmetic, comparisons and activation functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tfmq_fx.lowering.translation import Operator

if TYPE_CHECKING:
    from tfmq_fx.lowering.onnx.translator import OnnxTranslator

__all__ = ["OPERATORS"]

aten = torch.ops.aten


def _unary(operator: str) -> Operator:
    def translate(context: OnnxTranslator, input: Any) -> Any:
        return context.result(operator, [context.cast(input)])

    return translate


def _binary(operator: str) -> Operator:
    def translate(context: OnnxTranslator, input: Any, other: Any) -> Any:
        return context.result(operator, [context.cast(input), context.cast(other)])

    return translate


def _scaled(operator: str) -> Operator:
    """``add`` and ``sub``, whose second operand may have a factor."""

    def translate(context: OnnxTranslator, input: Any, other: Any, alpha: float = 1) -> Any:
        right = context.cast(other)
        if alpha != 1:
            right = context.emit("Mul", [right, context.cast(alpha)], right.shape, right.dtype)
        return context.result(operator, [context.cast(input), right])

    return translate


def _compare(operator: str) -> Operator:
    def translate(context: OnnxTranslator, input: Any, other: Any) -> Any:
        dtype = context.operand_value(0).dtype
        return context.result(operator, [context.cast(input, dtype), context.cast(other, dtype)])

    return translate


def _reduction(operator: str) -> Operator:
    """A reduction over some axes, or all of them."""

    def translate(context: OnnxTranslator, input: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        value = context.cast(input)
        axes = list(range(len(value.shape))) if dim in (None, []) else [dim] if isinstance(dim, int) else list(dim)
        return context.result(operator, [value, context.builder.sizes(axes)], keepdims=int(keepdim))

    return translate


def to_dtype(context: OnnxTranslator, input: Any, *_: Any, **__: Any) -> Any:
    """A cast; the dtype is that of the result."""
    return context.cast(input)


def same(context: OnnxTranslator, input: Any, *_: Any, **__: Any) -> Any:
    """What only concerns memory."""
    return input


def where(context: OnnxTranslator, condition: Any, input: Any, other: Any) -> Any:
    """An element of the one or of the other."""
    return context.result("Where", [context.value(condition), context.cast(input), context.cast(other)])


def clamp(context: OnnxTranslator, input: Any, min: Any = None, max: Any = None) -> Any:
    """Clamp to one or both bounds."""
    value = context.cast(input)
    for operator, bound in (("Max", min), ("Min", max)):
        if bound is not None:
            value = context.result(operator, [value, context.cast(bound)])
    return value


def silu(context: OnnxTranslator, input: Any) -> Any:
    """``x * sigmoid(x)``, which ONNX Runtime fuses."""
    value = context.cast(input)
    return context.result("Mul", [value, context.result("Sigmoid", [value])])


def gelu(context: OnnxTranslator, input: Any, approximate: str = "none") -> Any:
    """The Gaussian error linear unit, or its approximation by tanh."""
    return context.result("Gelu", [context.cast(input)], approximate=approximate)


def softmax(context: OnnxTranslator, input: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Softmax along one axis."""
    return context.result("Softmax", [context.cast(input)], axis=dim)


def rsqrt(context: OnnxTranslator, input: Any) -> Any:
    """One over the square root."""
    return context.result("Reciprocal", [context.result("Sqrt", [context.cast(input)])])


def argmin(context: OnnxTranslator, input: Any, dim: int, keepdim: bool = False) -> Any:
    """The place of the smallest value along one axis."""
    return context.result("ArgMin", [context.value(input)], axis=dim, keepdims=int(keepdim))


OPERATORS: Mapping[Any, Operator] = {
    aten.abs.default: _unary("Abs"),
    aten.cos.default: _unary("Cos"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.neg.default: _unary("Neg"),
    aten.relu.default: _unary("Relu"),
    aten.round.default: _unary("Round"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.sin.default: _unary("Sin"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.tanh.default: _unary("Tanh"),
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.silu.default: silu,
    aten.gelu.default: gelu,
    aten.rsqrt.default: rsqrt,
    aten.add.Tensor: _scaled("Add"),
    aten.sub.Tensor: _scaled("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.logical_and.default: _binary("And"),
    aten.eq.Scalar: _compare("Equal"),
    aten.eq.Tensor: _compare("Equal"),
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.gt.Scalar: _compare("Greater"),
    aten.le.Scalar: _compare("LessOrEqual"),
    aten.le.Tensor: _compare("LessOrEqual"),
    aten.lt.Scalar: _compare("Less"),
    aten.to.dtype: to_dtype,
    aten._to_copy.default: to_dtype,
    aten.clone.default: same,
    aten.contiguous.default: same,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.where.self: where,
    aten.where.ScalarOther: where,
    aten.where.ScalarSelf: where,
    aten.where.Scalar: where,
    aten.mean.dim: _reduction("ReduceMean"),
    aten.sum.dim_IntList: _reduction("ReduceSum"),
    aten.amax.default: _reduction("ReduceMax"),
    aten.amin.default: _reduction("ReduceMin"),
    aten.argmin.default: argmin,
}
