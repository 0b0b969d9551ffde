"""Fake quantization with gradients: through the rounding as if it were not there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["drop_quantization", "fake_quantize_fixed", "quantize_straight_through"]


class _FixedFakeQuantize(torch.autograd.Function):
    """Fake quantization with constant parameters: torch's own operator takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
        q = (x * scale.reciprocal()).round_().add_(zero_point)
        ctx.save_for_backward((q >= q_min) & (q <= q_max))
        return q.clamp_(q_min, q_max).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradients[0], 0.0), None, None, None, None


def fake_quantize_fixed(x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """``s (clamp(round(x / s) + z) - z)``; the gradient passes where nothing was clipped.

    Rounds ``x * (1 / s)``, as the quantize operators of torch do, so that it agrees with them to the bit.
    Arguments as for :func:`quantize_straight_through`; scale and zero point collect no gradient.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return (x * scale.reciprocal()).round_().add_(zero_point).clamp_(q_min, q_max).sub_(zero_point).mul_(scale)
    quantized: Tensor = _FixedFakeQuantize.apply(x, scale, zero_point, q_min, q_max)  # type: ignore[no-untyped-call]  # torch gives it no types
    return quantized


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
    ratio = x * scale.reciprocal()
    rounded = ratio + (ratio.round() - ratio).detach()
    return ((rounded + zero_point).clamp(q_min, q_max) - zero_point) * scale


def drop_quantization(quantized: Tensor, x: Tensor, probability: float) -> Tensor:
    """Leave each element unquantized with this probability (QDrop, Wei et al., ICLR 2022, section 4)."""
    if probability == 0.0:
        return quantized
    return torch.where(torch.rand_like(x) < probability, x, quantized)
