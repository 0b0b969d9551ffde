"""From a range of values to quantization parameters, and the searches for a good range.

Quantization here is ``q = clamp(round(x / s) + z, q_min, q_max)`` and ``x_hat = s * (q - z)``. Zero is
always representable and ``z`` is always an integer inside ``[q_min, q_max]``: convolutions pad with
exact zeros, and an unsigned zero point cannot be negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "asymmetric_parameters",
    "centred_parameters",
    "fake_quantize",
    "ordinary_size",
    "search_asymmetric",
    "search_symmetric",
    "symmetric_parameters",
]

#: Smallest scale: float32's smallest normal number, whose inverse is finite too; kernels multiply by that.
SCALE_FLOOR = torch.finfo(torch.float32).tiny
#: The norm of the range search, ``mean |x - x_hat| ** 2.4`` (Q-Diffusion and PTQ4DM use it alike).
SEARCH_NORM = 2.4
#: Candidates of the range search: the full range shrunk by 0 %, 1 %, … 79 %.
SHRINKS = tuple(1.0 - 0.01 * i for i in range(80))
#: Exponents of two between which powers of the error neither vanish nor overflow in float32.
SEARCHED_EXPONENTS = 24
#: Values that are searched at once: every candidate passes over them some ten times, which the caches should hold.
BLOCK = 2**17


def _scale(half_width: Tensor, half_levels: float) -> Tensor:
    """The step of a range, whatever its size; 1 for a range of zero width, in which 0 is the only value."""
    return torch.where(half_width > 0, (half_width / half_levels).clamp_min(SCALE_FLOOR), 1.0)


def asymmetric_parameters(low: Tensor, high: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """``s = (hi - lo) / (q_max - q_min)``, ``z = q_min - round(lo / s)`` with zero inside ``[lo, hi]``.

    Args:
        low: Lower ends, any shape, float.
        high: Upper ends, same shape.
        q_min: Smallest integer.
        q_max: Largest integer.

    Returns:
        Scales (float32) and zero points (int64) in the shape of ``low``.
    """
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    # In halves, because the width of float32's own range is infinite in float32.
    scale = _scale(high / 2 - low / 2, (q_max - q_min) / 2)
    zero = (q_min - (low / scale).round()).clamp(q_min, q_max)
    return scale.to(torch.float32), zero.to(torch.int64)


def symmetric_parameters(low: Tensor, high: Tensor, q_max: int) -> tuple[Tensor, Tensor]:
    """``s = max(|lo|, |hi|) / q_max``, ``z = 0``; shapes and dtypes as :func:`asymmetric_parameters`."""
    scale = _scale(torch.maximum(low.abs(), high.abs()), q_max)
    return scale.to(torch.float32), torch.zeros_like(scale, dtype=torch.int64)


def centred_parameters(low: Tensor, high: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """Symmetric quantization on unsigned integers: ``z`` is the middle, ``s = max(|lo|, |hi|) / (q_max - z)``.

    8 bits: ``z = 128``, ``s = max|x| / 127``. The integer kernels take uint8 activations, so this lowers as it is.
    Shapes and dtypes as :func:`asymmetric_parameters`.
    """
    middle = (q_min + q_max + 1) // 2
    scale, _ = symmetric_parameters(low, high, q_max - middle)
    return scale, torch.full_like(scale, middle, dtype=torch.int64)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """Quantize and dequantize ``x``; ``scale`` and ``zero_point`` broadcast against it."""
    q = (torch.round(x / scale) + zero_point).clamp(q_min, q_max)
    return (q - zero_point) * scale


def _search(
    x: Tensor, low: Tensor, high: Tensor, q_min: int, q_max: int, *, symmetric: bool, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best shrink of ``[low, high]`` per vector of ``x`` (shape ``[K, n]``) in the 2.4 norm, in blocks of vectors."""
    factor = ordinary_size(low, high)
    if bool((factor != 1).any()):
        scaled_low, scaled_high = _search(
            x * factor[:, None], low * factor, high * factor, q_min, q_max, symmetric=symmetric, weights=weights
        )
        return scaled_low / factor, scaled_high / factor
    size = max(1, BLOCK // max(1, x.shape[1]))
    blocks = [slice(first, first + size) for first in range(0, len(x), size)]
    ranges = [
        _search_block(
            x[block], low[block], high[block], q_min, q_max, symmetric, None if weights is None else weights[block]
        )
        for block in blocks
    ]
    return torch.cat([low for low, _ in ranges]), torch.cat([high for _, high in ranges])


def ordinary_size(low: Tensor, high: Tensor) -> Tensor:
    """Per range a power of two that brings it near 1 where powers of errors or products would leave float32, else 1."""
    exponent = torch.frexp(torch.maximum(low.abs(), high.abs())).exponent
    is_extreme = exponent.abs() > SEARCHED_EXPONENTS
    return torch.ldexp(torch.ones_like(low), torch.where(is_extreme, -exponent.clamp(-126, 126), 0))


def _search_block(
    x: Tensor, low: Tensor, high: Tensor, q_min: int, q_max: int, symmetric: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One candidate at a time over all vectors at once: 80 steps whatever their number."""
    best_low, best_high = low.clone(), high.clone()
    best = torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        candidate_low, candidate_high = low * shrink, high * shrink
        if symmetric:
            scale, zero = symmetric_parameters(candidate_low, candidate_high, q_max)
        else:
            scale, zero = asymmetric_parameters(candidate_low, candidate_high, q_min, q_max)
        error = (fake_quantize(x, scale[:, None], zero[:, None], q_min, q_max) - x).abs_().pow_(SEARCH_NORM)
        error = error.mean(1) if weights is None else error.mul_(weights).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, candidate_low, best_low)
        best_high = torch.where(better, candidate_high, best_high)
    return best_low, best_high


def search_asymmetric(
    x: Tensor, low: Tensor, high: Tensor, q_min: int, q_max: int, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The range ``(low, high) * (1 - 0.01 i)`` that quantizes each vector of ``x`` best, asymmetrically.

    Args:
        x: Values, ``K`` vectors of shape ``[K, n]``.
        low: Smallest value of each vector, shape ``[K]``.
        high: Largest value of each vector, shape ``[K]``.
        q_min: Smallest integer.
        q_max: Largest integer.
        weights: How much each value counts, shape ``[K, n]``; all alike by default.

    Returns:
        The chosen ``(low, high)``, each ``[K]``.
    """
    return _search(x, low.clamp_max(0.0), high.clamp_min(0.0), q_min, q_max, symmetric=False, weights=weights)


def search_symmetric(
    x: Tensor, low: Tensor, high: Tensor, q_min: int, q_max: int, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`search_asymmetric`, for symmetric parameters."""
    return _search(x, low, high, q_min, q_max, symmetric=True, weights=weights)
