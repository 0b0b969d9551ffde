"""The shapes of what the operators return, for tensors without data; each checks its arguments as the operator does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.kernels.checks import check_attention, check_conv, check_image, check_norm, common_size

__all__ = ["attention_size", "conv_output", "fake_attention", "fake_conv", "fake_image", "fake_norm",
           "fake_quantized_norm", "padded_image"]  # fmt: skip


def attention_size(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """Batch, heads, length of the query and depth of attention, once its operands are broadcast."""
    batch = common_size([x.shape[0] for x in (query, key, value)])
    heads = max(x.shape[1] for x in (query, key, value))
    return batch, heads, query.shape[2], query.shape[3]


def conv_output(x: Tensor, channels: int, kernel: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a convolution of ``x``, which is padded, gives."""
    height, width = ((size - k) // s + 1 for size, k, s in zip(x.shape[1:3], kernel, stride, strict=True))
    return x.new_empty((x.shape[0], height, width, channels), dtype=dtype)


def fake_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """What ``integer_conv`` returns."""
    check_conv(x, weight, scale, bias, residual, kernel, stride, dtype)
    return conv_output(x, scale.shape[0], kernel, stride, dtype)


def fake_norm(x: Sequence[Tensor], shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, *_: Any) -> Tensor:
    """What ``group_norm`` returns."""
    check_norm("group_norm", x, shift, weight, bias, groups)
    return x[0].new_empty((*x[0].shape[:3], weight.shape[0]), dtype=torch.float32)


def padded_image(x: Tensor, channels: int, enlarge: int, padding: Sequence[int]) -> Tensor:
    """``x`` in bytes, enlarged, with a border."""
    top, left, bottom, right = padding
    height, width = x.shape[1] * enlarge + top + bottom, x.shape[2] * enlarge + left + right
    return x.new_empty((x.shape[0], height, width, channels), dtype=torch.uint8)


def fake_quantized_norm(
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
    """What ``quantized_group_norm`` returns."""
    check_norm("quantized_group_norm", x, shift, weight, bias, groups)
    check_image("quantized_group_norm", x, 1, scale, zero_point, padding, factors)
    return padded_image(x[0], weight.shape[0], 1, padding)


def fake_image(
    x: Tensor, enlarge: int, scale: float, zero_point: int, padding: Sequence[int], factors: Tensor | None = None
) -> Tensor:
    """What ``quantized_image`` returns."""
    check_image("quantized_image", (x,), enlarge, scale, zero_point, padding, factors)
    return padded_image(x, x.shape[3], enlarge, padding)


def fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: float,
    scales: Sequence[float],
    zero_points: Sequence[int],
    deferred: bool = False,
) -> Tensor:
    """What ``integer_attention`` returns."""
    check_attention(query, key, value, scales, zero_points, deferred)
    batch, heads, length, depth = attention_size(query, key, value)
    return query.new_empty((batch, length, heads, depth))
