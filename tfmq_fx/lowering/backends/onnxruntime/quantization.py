"""Quantize, dequantize, and the integers that layers read directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.onnxruntime.context import OnnxContext
from tfmq_fx.lowering.backends.onnxruntime.integers import INTEGERS, IntegerActivation, IntegerWeight
from tfmq_fx.lowering.translation.aten import by_overload
from tfmq_fx.lowering.translation.translator import Operator

__all__ = ["OPERATORS"]


def _number(context: OnnxContext, value: Any) -> float:
    if not isinstance(value, (Tensor, int, float)):
        msg = (
            f"{context.engine} cannot quantize with computed parameters (node {context.node.name!r}); "
            "lower with backend='inductor' instead"
        )
        raise LoweringError(msg)
    return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def quantize(context: OnnxContext, input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int,
             dtype: torch.dtype) -> IntegerActivation:  # fmt: skip
    """``QuantizeLinear``, clamped where the range is narrower than the dtype; wider integers in float."""
    step, zero = _number(context, scale), int(_number(context, zero_point))
    x = context.value(input)
    if dtype not in INTEGERS:
        ratio = context.emit("Div", [x, context.number(step)], x.shape, x.dtype)
        rounded = context.emit("Round", [ratio], x.shape, x.dtype)
        bounds = [context.number(float(bound - zero)) for bound in (quant_min, quant_max)]
        clamped = context.emit("Clip", [rounded, *bounds], x.shape, x.dtype)
        return IntegerActivation(clamped, step, context.number(float(0)))
    offset = context.constant(torch.tensor(zero, dtype=dtype))
    integers = context.emit("QuantizeLinear", [x, context.number(step), offset], x.shape, dtype)
    limits = torch.iinfo(dtype)
    if (quant_min, quant_max) != (limits.min, limits.max):
        bounds = [context.constant(torch.tensor(bound, dtype=dtype)) for bound in (quant_min, quant_max)]
        integers = context.emit("Clip", [integers, *bounds], x.shape, dtype)
    return IntegerActivation(integers, step, offset)


def dequantize(context: OnnxContext, input: Any, scale: Any, zero_point: Any, *_: Any, **__: Any) -> Any:
    """Hand the integers on: layers read them, everything else has them dequantized."""
    if not isinstance(input, IntegerActivation) or input.scale != _number(context, scale):
        msg = f"{context.engine} cannot dequantize {context.node.args[0]} with parameters of its own"
        raise LoweringError(msg)
    return input


def dequantize_weight(context: OnnxContext, input: Any, scales: Tensor, zero_points: Tensor | None, axis: int,
                      *_: Any, **__: Any) -> IntegerWeight:  # fmt: skip
    """Hand the integers on; the zero points are 0 since ``FoldWeightZeroPoints``."""
    if not isinstance(input, Tensor) or (zero_points is not None and bool(zero_points.any())):
        msg = (
            f"{context.engine} cannot quantize row by row (node {context.node.name!r}); "
            "lower with backend='inductor' instead"
        )
        raise LoweringError(msg)
    return IntegerWeight(input, scales.float(), axis)


OPERATORS: Mapping[Any, Operator] = by_overload(
    {
        "dequantize": dequantize,
        "dequantize_weight": dequantize_weight,
        "quantize": quantize,
    }
)
