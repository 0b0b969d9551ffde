r"""The Fréchet distance between two sets of features, each seen as a Gaussian (Heusel et al., 2017, arXiv 1706.08500).

.. math:: d^2 = \|m_1 - m_2\|^2 + \mathrm{tr}(C_1) + \mathrm{tr}(C_2) - 2\,\mathrm{tr}\,(C_1 C_2)^{1/2}

With symmetric roots :math:`R_i R_i = C_i`, the last trace is the sum of the singular values of :math:`R_1 R_2`:
:math:`C_1 C_2` has the eigenvalues of :math:`(R_1 R_2)(R_1 R_2)^T`. So nothing is inverted, no root is taken of
a matrix that is not symmetric, and rounding enters once, not under a square root. All of it is float64.

A distance falls with the number of images even between sets of one distribution, so a number means
something only beside the distance of real images to real images at the same number: :func:`real_floor`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Floor", "Gaussian", "frechet_distance", "real_floor"]


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, float64.

    Attributes:
        mean: ``[D]``.
        covariance: ``[D, D]``, divided by ``count - 1``.
        count: Images that it was estimated from.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Estimate it from features ``[N, D]``, at least two.

        Raises:
            ValueError: There are fewer than two, or one is not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            msg = f"features are {list(features.shape)}; a covariance needs [N, D] with N of at least 2"
            raise ValueError(msg)
        values = features.double()
        if not bool(values.isfinite().all()):
            msg = f"{int((~values.isfinite().all(dim=1)).sum())} of {len(values)} feature vectors are not finite"
            raise ValueError(msg)
        mean = values.mean(dim=0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (len(values) - 1), len(values))

    def save(self, path: str | Path) -> None:
        """Write it, beside and renamed, so that the file is whole or absent."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        torch.save({"mean": self.mean, "covariance": self.covariance, "count": self.count}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Gaussian:
        """Read what :meth:`save` wrote."""
        return cls(**torch.load(path, weights_only=True))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance, as FID reports it; at least 0.

    Raises:
        ValueError: The dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        msg = f"features of {len(a.mean)} and of {len(b.mean)} dimensions have no distance"
        raise ValueError(msg)
    overlap = torch.linalg.svdvals(symmetric_root(a.covariance) @ symmetric_root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The root ``R = R^T``, ``R R = matrix``, of a positive semi-definite matrix; eigenvalues below 0 are rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


@dataclass(frozen=True)
class Floor:
    """Distances of disjoint sets of real images to the reference.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation; 0 when there is one.
        parts: Each of them.
        count: Real images in each set.
    """

    mean: float
    deviation: float
    parts: tuple[float, ...]
    count: int

    def __str__(self) -> str:
        """``mean ± standard deviation``."""
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def real_floor(parts: Sequence[Tensor], reference: Gaussian) -> Floor:
    """Measure real images against the reference as if they were generated.

    Args:
        parts: Features of disjoint sets of real images that are not in the reference, ``[N, D]`` each, with the
            ``N`` of the generated sets.
        reference: The reference that generated sets are measured against.

    Raises:
        ValueError: There is no part, or their sizes differ.
    """
    counts = {len(part) for part in parts}
    if len(counts) != 1:
        msg = f"the parts hold {sorted(counts)} images; the floor needs parts of one size"
        raise ValueError(msg)
    distances = tuple(frechet_distance(Gaussian.of(part), reference) for part in parts)
    deviation = statistics.stdev(distances) if len(distances) > 1 else 0.0
    return Floor(statistics.fmean(distances), deviation, distances, counts.pop())
