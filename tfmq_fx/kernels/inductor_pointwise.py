"""The pointwise convolution that quantizes its image itself, compiled through Inductor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tfmq_fx._torch import inductor as inductor_ir
from tfmq_fx.kernels.inductor_calls import CPP_TYPES, Number, Quantizer, kernel_call, numbers

__all__ = ["pointwise", "pointwise_rows"]


def pointwise(
    x: Any,
    weight: Any,
    weight_scale: Any,
    weight_sum: Any,
    bias: Any,
    residual: Any,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    factors: Any = None,
) -> Any:
    """``tfmq::integer_pointwise_conv``."""
    constants = (weight_scale, weight_sum, bias)
    return _pointwise(x, weight, constants, residual, Quantizer((scale, zero_point)), dtype, factors)


def pointwise_rows(
    x: Any,
    weight: Any,
    weight_scale: Any,
    weight_sum: Any,
    bias: Any,
    residual: Any,
    scales: Any,
    zero_points: Any,
    rows: Any,
    dtype: torch.dtype,
    factors: Any = None,
) -> Any:
    """``tfmq::integer_pointwise_conv.rows``."""
    table = Quantizer(None, (scales, zero_points, rows))
    return _pointwise(x, weight, (weight_scale, weight_sum, bias), residual, table, dtype, factors)


def _pointwise(
    x: Any,
    weight: Any,
    constants: Sequence[Any],
    residual: Any,
    quantizer: Quantizer,
    dtype: torch.dtype,
    factors: Any,
) -> Any:
    optional = [None if value is None else inductor_ir.contiguous(value) for value in (factors, residual)]
    further = [value for value in optional if value is not None]
    operands = [*(inductor_ir.contiguous(value) for value in (x, weight, *constants)), *further, *quantizer.inputs]
    batch, height, width, depth = x.get_size()
    channels, vectors = constants[0].get_size()[0], int(weight.get_size()[3]) // 16

    def statement(names: Sequence[str], output: str, number: Number) -> str:
        image, packed, *others = names
        of_channels = ", ".join(others[: len(constants)])
        rest = iter(others[len(constants) :])
        by, added = ("nullptr" if value is None else next(rest) for value in optional)
        shape = numbers((batch, height * width, depth, channels), number)
        arguments = f"{image}, {by}, {packed}, {of_channels}, {added}, {output}"
        call = f"tfmq::pointwise_conv<{vectors}, {CPP_TYPES[x.get_dtype()]}, {CPP_TYPES[dtype]}>"
        return f"{call}({arguments}, tfmq::PointwiseShape{{{shape}}}, {quantizer.cpp(names, batch, number)});"

    return kernel_call("pointwise.h", (batch, height, width, channels), dtype, operands, statement)
