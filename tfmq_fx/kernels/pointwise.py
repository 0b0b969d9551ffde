"""The 1×1 convolution that quantizes its image itself, to 16 bits: its schemas and what it computes, in plain torch.

An image that a projection shortcut reads is the residual stream: no norm has bounded it, and what is lost of it goes
straight into the sum. It is quantized to 16 bits, a value's high and low byte are multiplied by the same 8-bit weight,
and the sums are put together: twice the products of a layer that has few of them, and no image in memory between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.kernels.checks import MOST_WORD, check_pointwise
from tfmq_fx.kernels.operators import scaled_channels
from tfmq_fx.kernels.packing import unpack_weight
from tfmq_fx.kernels.row_checks import check_pointwise_rows
from tfmq_fx.kernels.row_operators import OPERATORS

__all__ = ["OPERATORS"]

_library: Any = torch.library.Library("tfmq", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch gives it no types

_library.define(
    "integer_pointwise_conv(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor bias, "
    "Tensor? residual, float scale, int zero_point, ScalarType dtype, Tensor? factors=None) -> Tensor"
)
_library.define(
    "integer_pointwise_conv.rows(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor bias, "
    "Tensor? residual, Tensor scales, Tensor zero_points, Tensor rows, ScalarType dtype, Tensor? factors=None)"
    " -> Tensor"
)


def integer_pointwise_conv(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    factors: Tensor | None = None,
) -> Tensor:
    """``s * weight_scale * sum((quantize(x * factors) - z) * weight) + bias (+ residual)``, exact in the integers.

    Args:
        x: float32 or bfloat16 ``[N, H, W, C]``; it is quantized to 0..65535.
        weight: int8, packed by :func:`tfmq_fx.kernels.packing.pack_weight` from ``[K, C, 1, 1]``.
        weight_scale: float32 ``[K]``.
        weight_sum: int32 ``[K]``, of all of a channel's weights.
        bias: float32 ``[K]``.
        residual: Added to the result, ``[N, H, W, K]`` of ``dtype``.
        scale: Of the image.
        zero_point: Of the image, 0 to 65535.
        dtype: float32 or bfloat16, of the result ``[N, H, W, K]``.
        factors: float32 ``[C]``, by which the channels are multiplied before they are quantized.
    """
    constants = (weight_scale, weight_sum, bias)
    check_pointwise(x, weight, constants, residual, scale, zero_point, dtype, factors)
    ones = [1, 1, 1, 1]
    scales, zeros = torch.tensor(scale, dtype=torch.float64).reshape(ones), torch.tensor(zero_point).reshape(ones)
    return _meaning(x, weight, constants, residual, scales.float(), zeros, dtype, factors)


def integer_pointwise_conv_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    factors: Tensor | None = None,
) -> Tensor:
    """The same by each item's row of a table: scales float32 ``[G]``, zero points int64 ``[G]``, rows int64."""
    constants, table = (weight_scale, weight_sum, bias), (scales, zero_points, rows)
    check_pointwise_rows(x, weight, constants, residual, table, dtype, factors)
    chosen = rows.clamp(0, len(scales) - 1).repeat_interleave(len(x) // max(1, len(rows)), 0)
    scale, zero_point = (values[chosen].reshape(-1, 1, 1, 1) for values in (scales, zero_points))
    return _meaning(x, weight, constants, residual, scale, zero_point, dtype, factors)


def _meaning(
    x: Tensor,
    weight: Tensor,
    constants: tuple[Tensor, Tensor, Tensor],
    residual: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    dtype: torch.dtype,
    factors: Tensor | None,
) -> Tensor:
    weight_scale, _, bias = constants
    steps = torch.round(scaled_channels(x, factors).float() * (1.0 / scale.double()).float()).double() + zero_point
    words = steps.clamp(0, MOST_WORD).nan_to_num(0.0)
    plain = unpack_weight(weight, x.shape[-1], (1, 1))[:, :, 0, 0]
    result = ((words - zero_point) @ plain.double().T) * (scale.double() * weight_scale.double()) + bias.double()
    if residual is not None:
        result = result + residual.double()
    return result.to(dtype).contiguous()


def _result(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:3], channels), dtype=dtype)


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    weight_scale, weight_sum, bias, residual, scale, zero_point, dtype, *factors = rest
    constants, further = (weight_scale, weight_sum, bias), next(iter(factors), None)
    check_pointwise(x, weight, constants, residual, scale, zero_point, dtype, further)
    return _result(x, weight_scale.shape[0], dtype)


def _fake_rows(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    weight_scale, weight_sum, bias, residual, scales, zero_points, rows, dtype, *factors = rest
    constants, further = (weight_scale, weight_sum, bias), next(iter(factors), None)
    check_pointwise_rows(x, weight, constants, residual, (scales, zero_points, rows), dtype, further)
    return _result(x, weight_scale.shape[0], dtype)


for _name, _computes, _shape in (
    ("integer_pointwise_conv", integer_pointwise_conv, _fake),
    ("integer_pointwise_conv.rows", integer_pointwise_conv_rows, _fake_rows),
):
    _library.impl(_name, _computes, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tfmq::{_name}", _shape, lib=_library)
