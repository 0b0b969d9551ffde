"""Distances and cosines of feature vectors that are exact where it matters: zero for equal vectors.

``cos(u, v) = (|u|^2 + |v|^2 - |u - v|^2) / 2`` for unit vectors. Taken from the chord ``|u - v|`` rather
than from the product, the cosine of a vector with itself is 1 to the last bit, and 1 - cos of two
neighbouring timesteps, often 1e-7 and less, keeps all its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cosine_of_chord", "distances", "ratio", "unit"]


def unit(x: Tensor) -> Tensor:
    """The rows of ``x`` ``[T, C]`` divided by their norms, float64; a zero row stays zero."""
    x = x.double()
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, x / norm, x)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between the rows of ``a`` ``[T, C]`` and those of ``b`` ``[S, C]``: float64 ``[T, S]``."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def cosine_of_chord(u: Tensor, v: Tensor, chord: Tensor) -> Tensor:
    """The cosine of unit (or zero) vectors from their distance; a zero vector is orthogonal to all.

    Args:
        u: Rows of :func:`unit`, ``[T, C]``.
        v: The same, ``[T, C]`` for ``chord`` ``[T]``, or ``[S, C]`` for ``chord`` ``[T, S]``.
        chord: Distances ``|u - v|``.
    """
    one, other = (rows.any(dim=1).double() for rows in (u, v))
    squares = one[:, None] + other if chord.ndim == 2 else one + other
    return (squares - chord.square()) / 2


def ratio(error: Tensor, norm: Tensor) -> Tensor:
    """``error / norm``; no error is 0 whatever the norm, an error on top of nothing is infinite."""
    return torch.where(error == 0, torch.zeros_like(error), error / norm)
