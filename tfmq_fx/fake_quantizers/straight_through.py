"""Fake quantization with gradients: through the rounding as if it were not there."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drop_quantization", "quantize_straight_through"]


def quantize_straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """``s (clamp(round(x / s) + z) - z)``, differentiable in ``x`` and ``s``.

    The gradient for ``s`` is that of LSQ (Esser et al., ICLR 2020, equation 3): ``round(x/s) - x/s`` inside
    the range, the distance of the bound from ``z`` outside.

    Args:
        x: Values, float, any shape.
        scale: Broadcasts against ``x``.
        zero_point: Broadcasts against ``x``.
        q_min: Smallest integer.
        q_max: Largest integer.
    """
    ratio = x / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    return ((rounded + zero_point).clamp(q_min, q_max) - zero_point) * scale


def drop_quantization(quantized: Tensor, x: Tensor, probability: float) -> Tensor:
    """Leave each element unquantized with this probability (QDrop, Wei et al., ICLR 2022, section 4)."""
    if probability == 0.0:
        return quantized
    return torch.where(torch.rand_like(x) < probability, x, quantized)
