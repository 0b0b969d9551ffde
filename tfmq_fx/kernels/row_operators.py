"""The overloads ``.rows`` of the operators: a quantizer for each item of a batch, out of a table.

Activation parameters are features of the timestep like any other, and the items of a batch may have any timesteps. So
the place of one scale and zero point is taken by a table of them and the row of each item, ``rows``, int64 ``[items]``.
An item has as many images, one behind the other, as there are for each: one, or the pixels of a linear. A row outside
the table is the nearest one inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tfmq_fx.kernels.checks import check_norm
from tfmq_fx.kernels.operators import OPERATORS, attention_weights, group_norm, pad_image, scaled_channels
from tfmq_fx.kernels.packing import unpack_weight
from tfmq_fx.kernels.row_checks import check_attention_rows, check_conv_rows, check_image_rows
from tfmq_fx.kernels.shapes import attention_size, conv_output, padded_image

__all__ = ["OPERATORS"]

_library: Any = torch.library.Library("tfmq", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch gives it no types

_library.define(
    "integer_conv.rows(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor bias, Tensor? residual, "
    "Tensor scales, Tensor zero_points, Tensor rows, int[2] kernel, int[2] stride, ScalarType dtype) -> Tensor"
)
_library.define(
    "quantized_group_norm.rows(Tensor[] x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, "
    "bool silu, Tensor scales, Tensor zero_points, Tensor rows, int[4] padding, Tensor? factors=None) -> Tensor"
)
_library.define(
    "quantized_image.rows(Tensor x, int enlarge, Tensor scales, Tensor zero_points, Tensor rows, int[4] padding, "
    "Tensor? factors=None) -> Tensor"
)
_library.define(
    "integer_attention.rows(Tensor query, Tensor key, Tensor value, float factor, Tensor scales, Tensor zero_points, "
    "Tensor rows, bool deferred=False) -> Tensor"
)


def _by_image(table: Tensor, rows: Tensor, images: int) -> Tensor:
    """The row of the table for each image, ``[images, ...]``."""
    return table[rows.clamp(0, len(table) - 1)].repeat_interleave(images // len(rows), 0)


def _quantize_by_image(value: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``value`` (``[images, ...]``) in bytes, by parameters of each image."""
    shape = [-1] + [1] * (value.ndim - 1)
    inverse = (1.0 / scale.double()).float().reshape(shape)
    steps = torch.round(value.float() * inverse) + zero_point.reshape(shape)
    return steps.clamp(0, 255).nan_to_num(0.0).to(torch.uint8)


def _pad_by_image(value: Tensor, zero_point: Tensor, padding: Sequence[int]) -> Tensor:
    """``value`` with a border of the zero points, which stand for 0."""
    zeros = zero_point.reshape(-1, 1, 1, 1).to(torch.int16)
    return (pad_image(value.to(torch.int16) - zeros, 0, padding) + zeros).to(torch.uint8)


def integer_conv_rows(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``s * weight_scale * conv(x - z, weight) + bias (+ residual)``, the sum in exact integers.

    Args:
        x: uint8 ``[N, H, W, C]``, padded with each image's zero point.
        weight: int8, packed by :func:`tfmq_fx.kernels.packing.pack_weight` from ``[K, C, *kernel]``.
        weight_scale: float32 ``[K]``.
        weight_sum: int32 ``[K]``, of all of a channel's weights: what a step of the zero point adds to a sum.
        bias: float32 ``[K]``.
        residual: Added to the result, ``[N, H', W', K]`` of ``dtype``.
        scales: The table's activation scales ``s``, float32 ``[G]``.
        zero_points: Its zero points ``z``, int64 ``[G]``.
        rows: The row of each item, int64; their number divides ``N``.
        kernel: Height and width of the kernel.
        stride: Stride of both axes.
        dtype: float32 or bfloat16, of the result ``[N, H', W', K]``.
    """
    constants = (weight_scale, weight_sum, bias)
    check_conv_rows(x, weight, constants, residual, (scales, zero_points, rows), kernel, stride, dtype)
    scale, zero = (_by_image(table, rows, len(x)).reshape(-1, 1, 1, 1).double() for table in (scales, zero_points))
    plain = unpack_weight(weight, x.shape[-1], kernel)
    total = functional.conv2d(x.permute(0, 3, 1, 2).double(), plain.double(), stride=list(stride)).permute(0, 2, 3, 1)
    result = (total - zero * weight_sum.double()) * (scale * weight_scale.double()) + bias.double()
    if residual is not None:
        result = result + residual.double()
    return result.to(dtype).contiguous()


def quantized_group_norm_rows(
    x: Sequence[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    padding: Sequence[int],
    factors: Tensor | None = None,
) -> Tensor:
    """``quantized_group_norm`` by each item's row."""
    check_image_rows("quantized_group_norm", x, 1, (scales, zero_points, rows), padding, factors)
    scale, zero = (_by_image(table, rows, len(x[0])) for table in (scales, zero_points))
    value = scaled_channels(group_norm(x, shift, weight, bias, groups, eps, silu), factors)
    return _pad_by_image(_quantize_by_image(value, scale, zero), zero, padding)


def quantized_image_rows(
    x: Tensor,
    enlarge: int,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    padding: Sequence[int],
    factors: Tensor | None = None,
) -> Tensor:
    """``quantized_image`` by each item's row."""
    check_image_rows("quantized_image", (x,), enlarge, (scales, zero_points, rows), padding, factors)
    scale, zero = (_by_image(table, rows, len(x)) for table in (scales, zero_points))
    value = (
        _quantize_by_image(scaled_channels(x, factors), scale, zero)
        .repeat_interleave(enlarge, 1)
        .repeat_interleave(enlarge, 2)
    )
    return _pad_by_image(value, zero, padding)


def integer_attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    deferred: bool = False,
) -> Tensor:
    """``softmax((query * factor) key') value`` with all four operands quantized by each item's row.

    Args:
        query: float ``[N or 1, heads or 1, L, D]``, quantized by each item's row, one image of it too.
        key: float ``[N or 1, a divisor of heads, S, D]``.
        value: float ``[N or 1, a divisor of heads, S, D]``. Keys and values of one image are quantized once, by the
            first item's row: their columns of the table should be constant then.
        factor: Multiplies the query before it is quantized.
        scales: Of the query, the key, the softmax and the value, float32 ``[G, 4]``.
        zero_points: The same, int64 ``[G, 4]``; that of the softmax is 0.
        rows: The row of each item, int64 ``[N]``.
        deferred: As for ``integer_attention``.

    Returns:
        ``[N, L, heads, D]`` of the dtype of ``query``.
    """
    check_attention_rows(query, key, value, scales, zero_points, rows, deferred)
    batch, heads = attention_size(query, key, value)[:2]
    scale = _by_image(scales, rows, batch).double().reshape(batch, 4, 1, 1, 1)
    zero = _by_image(zero_points, rows, batch).reshape(batch, 4, 1, 1, 1)
    query = query.expand(batch, -1, -1, -1)  # one image of queries is quantized by each item's row
    q, k, v = (
        _quantize_by_image(x, scale[: len(x), place], zero[: len(x), place]).double() - zero[: len(x), place]
        for x, place in ((query.float() * factor, 0), (key, 1), (value, 3))
    )
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() * (scale[:, 0] * scale[:, 1])
    fractions = attention_weights(scores, deferred).float().expand(batch, -1, -1, -1)
    weights = _quantize_by_image(fractions, scale[:, 2], zero[:, 2]).double()
    of_weights = 1 / weights.sum(-1, keepdim=True) if deferred else scale[:, 2]
    return ((weights @ v) * (of_weights * scale[:, 3])).transpose(1, 2).to(query.dtype).contiguous()


def _fake_conv(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    weight_scale, weight_sum, bias, residual, scales, zero_points, rows, kernel, stride, dtype = rest
    constants = (weight_scale, weight_sum, bias)
    check_conv_rows(x, weight, constants, residual, (scales, zero_points, rows), kernel, stride, dtype)
    return conv_output(x, weight_scale.shape[0], kernel, stride, dtype)


def _fake_norm(
    x: Sequence[Tensor], shift: Any, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, *rest: Any
) -> Tensor:
    scales, zero_points, rows, padding, *factors = rest
    check_norm("quantized_group_norm", x, shift, weight, bias, groups)
    check_image_rows("quantized_group_norm", x, 1, (scales, zero_points, rows), padding, next(iter(factors), None))
    return padded_image(x[0], weight.shape[0], 1, padding)


def _fake_image(
    x: Tensor,
    enlarge: int,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    padding: Sequence[int],
    factors: Tensor | None = None,
) -> Tensor:
    check_image_rows("quantized_image", (x,), enlarge, (scales, zero_points, rows), padding, factors)
    return padded_image(x, x.shape[3], enlarge, padding)


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    scales: Tensor,
    zero_points: Tensor,
    rows: Tensor,
    deferred: bool = False,
) -> Tensor:
    check_attention_rows(query, key, value, scales, zero_points, rows, deferred)
    batch, heads, length, depth = attention_size(query, key, value)
    return query.new_empty((batch, length, heads, depth))


for _name, _meaning, _shape in (
    ("integer_conv.rows", integer_conv_rows, _fake_conv),
    ("quantized_group_norm.rows", quantized_group_norm_rows, _fake_norm),
    ("quantized_image.rows", quantized_image_rows, _fake_image),
    ("integer_attention.rows", integer_attention_rows, _fake_attention),
):
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tfmq::{_name}", _shape, lib=_library)
