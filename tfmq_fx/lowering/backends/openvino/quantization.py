"""Quantize and dequantize in the forms that OpenVINO's low precision transformations read.

An activation's pair is one ``FakeQuantize``; a weight is an integer constant, converted and multiplied by its scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from openvino import Type
from openvino import opset15 as opset
from torch import Tensor

from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.translation.aten import by_overload
from tfmq_fx.lowering.translation.translator import Operator, Translator

__all__ = ["OPERATORS"]

#: Steps of the range of a byte.
MOST_LEVELS = 255
#: Ranges below this are scaled.
SMALLEST_RANGE = 2.0**-10
#: The inverse of the factor stays a normal number.
MAX_EXPONENT = 126


@dataclass(frozen=True)
class Quantized:
    """A quantized value that is not computed: its readers dequantize it with the same parameters."""

    source: Any
    parameters: tuple[float, int, int, int]


def _number(value: Any) -> float:
    return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def _fixed(context: Translator, *parameters: Any) -> tuple[float, int, int, int]:
    """Scale, zero point and range in numbers."""
    if not all(isinstance(p, (Tensor, int, float)) for p in parameters):
        msg = (
            f"{context.engine} cannot quantize with computed parameters (node {context.node.name!r}); "
            "lower with backend='inductor' instead"
        )
        raise LoweringError(msg)
    scale, zero, low, high = map(_number, parameters)
    return scale, int(zero), int(low), int(high)


def quantize(context: Translator, input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int,
             dtype: torch.dtype) -> Quantized:  # fmt: skip
    """Note the parameters; :func:`dequantize` makes the pair."""
    return Quantized(context.value(input), _fixed(context, scale, zero_point, quant_min, quant_max))


def dequantize(context: Translator, input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int,
               dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> Any:  # fmt: skip
    """One ``FakeQuantize`` for the pair, with the real values of the lowest and highest integer as its range.

    A small range is brought near 1 by a power of two, which a product takes back: the engine compares the ends of a
    range with 1e-6, and where a processor has signed activations (AMX) takes smaller ones for one-sided. More than 8
    bits are rounded in float: a ``FakeQuantize`` of so many levels is off by percents (2026.1). So is everything where
    sums of bytes saturate: the engine puts layers between two of its own quantizers on integer kernels.
    """
    parameters = _fixed(context, scale, zero_point, quant_min, quant_max)
    if not isinstance(input, Quantized) or input.parameters != parameters:
        msg = f"{context.engine} cannot dequantize {context.node.args[0]} with parameters of its own"
        raise LoweringError(msg)
    step, zero, low, high = parameters
    if high - low > MOST_LEVELS or not sums_bytes_exactly():
        return _in_float(input.source, *parameters)
    ends = [(level - zero) * step for level in (low, high)]
    bounds = [opset.constant(end, dtype=Type.f32) for end in ends]
    largest = max(map(abs, ends))
    if largest >= SMALLEST_RANGE:
        return opset.fake_quantize(input.source, *bounds, *bounds, levels=high - low + 1).output(0)
    factor = 2.0 ** min(MAX_EXPONENT, -math.frexp(largest)[1])
    results = [opset.constant(end * factor, dtype=Type.f32) for end in ends]
    scaled = opset.fake_quantize(input.source, *bounds, *results, levels=high - low + 1)
    return opset.multiply(scaled, opset.constant(1 / factor, dtype=Type.f32)).output(0)


def _in_float(source: Any, step: float, zero: int, low: int, high: int) -> Any:
    """What the pair does, step by step."""
    inverse, scale = (opset.constant(number, dtype=Type.f32) for number in (1.0 / step, step))
    lowest, highest = float(low - zero), float(high - zero)
    steps = opset.clamp(opset.round(opset.multiply(source, inverse), "half_to_even"), lowest, highest)
    return opset.multiply(steps, scale).output(0)


def dequantize_weight(context: Translator, input: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int,
                      quant_min: int, quant_max: int, dtype: torch.dtype, **_: Any) -> Any:  # fmt: skip
    """``multiply(convert(integers), scales)``; the zero points are 0 since ``FoldWeightZeroPoints``."""
    if not isinstance(input, Tensor) or (zero_points is not None and bool(zero_points.any())):
        msg = (
            f"{context.engine} cannot quantize {context.node.name!r} row by row; lower with backend='inductor' instead"
        )
        raise LoweringError(msg)
    along = [1] * input.ndim
    along[axis] = -1
    real = opset.convert(context.constant(input), Type.f32)
    return opset.multiply(real, context.constant(scales.float().reshape(along))).output(0)


OPERATORS: Mapping[Any, Operator] = by_overload(
    {
        "dequantize": dequantize,
        "dequantize_weight": dequantize_weight,
        "quantize": quantize,
    }
)
