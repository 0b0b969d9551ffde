"""The operators of our integer kernels: their schemas and what they compute, in plain torch.

Images are channels last, ``[N, H, W, C]`` and contiguous, because that is how the kernels walk them. A quantized image
carries its border: it was padded with its zero point, which stands for exactly 0, so that a convolution reads it
without a condition. What is defined here runs anywhere and says what is meant; Inductor compiles the same operators to
the C++ beside this file (:mod:`tfmq_fx.kernels.inductor`).

The overloads ``.rows`` (:mod:`tfmq_fx.kernels.row_operators`) have a quantizer for each item of the batch.

What a byte cannot hold: quantizing takes the infinities, and all that is out of range, to the nearest of 0 and 255, and
NaN to 0. So NaN ends where something is quantized, and whoever must not miss it looks for it in the inputs. A norm in
float passes it on: one NaN or infinity makes its whole group NaN, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tfmq_fx.kernels.checks import check_attention, check_conv, check_image, check_norm
from tfmq_fx.kernels.packing import unpack_weight
from tfmq_fx.kernels.shapes import (
    attention_size,
    fake_attention,
    fake_conv,
    fake_image,
    fake_norm,
    fake_quantized_norm,
)

__all__ = ["OPERATORS", "attention_weights", "group_norm", "pad_image", "scaled_channels"]

_library: Any = torch.library.Library("tfmq", "DEF")  # type: ignore[no-untyped-call]  # torch gives it no types

_library.define(
    "integer_conv(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? residual, int[2] kernel, int[2] stride, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "group_norm(Tensor[] x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor"
)
_library.define(
    "quantized_group_norm(Tensor[] x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, bool silu, "
    "float scale, int zero_point, int[4] padding, Tensor? factors=None) -> Tensor"
)
_library.define(
    "quantized_image(Tensor x, int enlarge, float scale, int zero_point, int[4] padding, Tensor? factors=None)"
    " -> Tensor"
)
_library.define(
    "integer_attention(Tensor query, Tensor key, Tensor value, float factor, float[4] scales, int[3] zero_points, "
    "bool deferred=False) -> Tensor"
)

#: The operators, by what they replace.
OPERATORS = torch.ops.tfmq


def integer_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``scale * conv(x, weight) + bias (+ residual)``, the sum in exact integers.

    Args:
        x: uint8 ``[N, H, W, C]``, padded.
        weight: int8, packed by :func:`tfmq_fx.kernels.packing.pack_weight` from ``[K, C, *kernel]``.
        scale: float32 ``[K]``, of the activation times that of the weight.
        bias: float32 ``[K]``, with what the zero point of ``x`` adds taken off.
        residual: Added to the result, ``[N, H', W', K]`` of ``dtype``.
        kernel: Height and width of the kernel.
        stride: Stride of both axes.
        dtype: float32 or bfloat16, of the result ``[N, H', W', K]``.
    """
    check_conv(x, weight, scale, bias, residual, kernel, stride, dtype)
    plain = unpack_weight(weight, x.shape[-1], kernel)
    total = functional.conv2d(x.permute(0, 3, 1, 2).double(), plain.double(), stride=list(stride))
    result = total.permute(0, 2, 3, 1) * scale.double() + bias.double()
    if residual is not None:
        result = result + residual.double()
    return result.to(dtype).contiguous()


def group_norm(
    x: Sequence[Tensor], shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Normalize the concatenation of ``x``, with ``shift`` added to each channel, and apply SiLU where asked to.

    Args:
        x: One or two images of floats ``[N, H, W, C_i]``.
        shift: float32 ``[N or 1, C]``.
        weight: float32 ``[C]``.
        bias: float32 ``[C]``.
        groups: Number of groups.
        eps: Added to the variance.
        silu: Whether ``x * sigmoid(x)`` follows.

    Returns:
        float32 ``[N, H, W, C]``.
    """
    check_norm("group_norm", x, shift, weight, bias, groups)
    image = torch.cat([part.float() for part in x], -1)
    if shift is not None:
        image = image + shift[:, None, None, :]
    result = functional.group_norm(image.permute(0, 3, 1, 2), groups, weight, bias, eps)
    return (functional.silu(result) if silu else result).permute(0, 2, 3, 1).contiguous()


def _quantize(value: Tensor, scale: float, zero_point: int) -> Tensor:
    steps = torch.round(value.float() * (1.0 / scale)) + zero_point
    return steps.clamp(0, 255).nan_to_num(0.0).to(torch.uint8)


def scaled_channels(value: Tensor, factors: Tensor | None) -> Tensor:
    """``value`` (``[..., C]``) times a factor for each channel, where there are any."""
    return value if factors is None else value.float() * factors


def pad_image(value: Tensor, zero_point: int, padding: Sequence[int]) -> Tensor:
    """``value`` (``[N, H, W, C]``) with a border: top, left, bottom, right."""
    top, left, bottom, right = padding
    return functional.pad(value, [0, 0, left, right, top, bottom], value=zero_point)


def quantized_group_norm(
    x: Sequence[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    scale: float,
    zero_point: int,
    padding: Sequence[int],
    factors: Tensor | None = None,
) -> Tensor:
    """:func:`group_norm`, quantized to uint8 and padded (top, left, bottom, right) with the zero point.

    Where there are ``factors``, float32 ``[C]``, the channels are multiplied by them before they are quantized.
    """
    check_image("quantized_group_norm", x, 1, scale, zero_point, padding, factors)
    value = scaled_channels(group_norm(x, shift, weight, bias, groups, eps, silu), factors)
    return pad_image(_quantize(value, scale, zero_point), zero_point, padding)


def quantized_image(
    x: Tensor, enlarge: int, scale: float, zero_point: int, padding: Sequence[int], factors: Tensor | None = None
) -> Tensor:
    """Quantize ``x`` (``[N, H, W, C]``) to uint8, each pixel ``enlarge`` times in both axes, with a border.

    Where there are ``factors``, float32 ``[C]``, the channels are multiplied by them before they are quantized.
    """
    check_image("quantized_image", (x,), enlarge, scale, zero_point, padding, factors)
    value = _quantize(scaled_channels(x, factors), scale, zero_point)
    value = value.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    return pad_image(value, zero_point, padding)


def integer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    scales: Sequence[float],
    zero_points: Sequence[int],
    deferred: bool = False,
) -> Tensor:
    """``softmax((query * factor) key') value`` with all four operands of the two products quantized to uint8.

    Operands of one image or one head are for all of them. Keys and values may also have any number of heads that
    divides the query's: each is then for as many neighbouring heads (grouped queries).

    Args:
        query: float ``[N or 1, heads or 1, L, D]``.
        key: float ``[N or 1, a divisor of heads, S, D]``.
        value: float ``[N or 1, a divisor of heads, S, D]``.
        factor: Multiplies the query before it is quantized.
        scales: Of the query, the key, the softmax and the value.
        zero_points: Of the query, the key and the value; that of the softmax is 0.
        deferred: Whether what is quantized of the softmax are its numerators ``exp(s - max s)``, and the second
            product is divided by their sum.

    Returns:
        ``[N, L, heads, D]`` of the dtype of ``query``.
    """
    check_attention(query, key, value, scales, zero_points, deferred)
    heads = attention_size(query, key, value)[1]
    q, k, v = (
        _quantize(x, scale, zero).double() - zero
        for x, scale, zero in zip(
            (query.float() * factor, key, value), (scales[0], scales[1], scales[3]), zero_points, strict=True
        )
    )
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() * (scales[0] * scales[1])
    weights = _quantize(attention_weights(scores, deferred), scales[2], 0).double()
    scale = 1 / weights.sum(-1, keepdim=True) if deferred else scales[2]
    return ((weights @ v) * (scale * scales[3])).transpose(1, 2).to(query.dtype).contiguous()


def attention_weights(scores: Tensor, deferred: bool) -> Tensor:
    """The softmax of ``scores``, or its numerators where the division is deferred."""
    return (scores - scores.amax(-1, keepdim=True)).exp() if deferred else torch.softmax(scores, -1)


for _name, _meaning, _shape in (
    ("integer_conv", integer_conv, fake_conv),
    ("group_norm", group_norm, fake_norm),
    ("quantized_group_norm", quantized_group_norm, fake_quantized_norm),
    ("quantized_image", quantized_image, fake_image),
    ("integer_attention", integer_attention, fake_attention),
):
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tfmq::{_name}", _shape, lib=_library)
