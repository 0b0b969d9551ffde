r"""GPTQ: a layer's weights are rounded one input channel after the other, each making up for the errors before it.

With the inputs :math:`X` of the quantized prefix, those of the float model :math:`X_f` and weights :math:`w` in units
of their scales, the integers :math:`q` of an output channel are to minimise

.. math::
    (q - t) H (q - t)^T, \quad H = X X^T, \quad t = w + \alpha w (X_f - X) X^T H^{-1}

With :math:`\alpha = 0` that is :math:`\| q X - w X \|^2`, with 1 :math:`\| q X - w X_f \|^2` up to a constant: the
layer makes up for what went wrong before it, too. A part of that is better than none or all
(:data:`CORRECTED`), perhaps because noise in :math:`X` makes the best :math:`t` smaller than :math:`w`.

With the Cholesky factor of the damped :math:`H = L L^T` the error is
:math:`\sum_j L_{jj}^2 (e_j + \sum_{k>j} L_{kj} e_k / L_{jj})^2` for :math:`e = q - t`: from the last column to the
first, each term is made as small as rounding can make it. Columns stand in the order of their :math:`H_{jj}`, so that
the largest is rounded first.

Sources: Frantar et al., *GPTQ*, ICLR 2023, section 3 (there the factor is that of the inverse, which gives the same
integers: Chen et al., arXiv 2507.18553); Li et al., *GPTAQ*, arXiv 2504.02692, for the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq_fx.errors import ReconstructionError

__all__ = ["CORRECTED", "TRIED", "InputMoments", "nearest_plane", "round_columns"]

#: How much of the input's error a layer makes up for: of 0, 0.3 and 1, 0.3 gave the best images in one run each, of two
#: models (the second without 1) at W4A8.
CORRECTED = 0.3
#: Scales that are tried for each channel, relative to those of rounding to nearest. At W4A8 on the emoji model they
#: left 20 % less error of a prediction, and images 1.1 dB nearer (one run).
TRIED = (0.78, 0.85, 0.92, 1.0, 1.08, 1.16)
#: Columns whose corrections of all columns before them are summed in one matrix product.
BLOCK = 128
#: Layers up to this many input columns are solved in float64; beyond, the matrix alone would have gigabytes.
MOST_EXACT = 4096
#: What the damping grows by where rounding errors leave the matrix indefinite.
MORE_DAMPING = 10.0


class InputMoments:
    """What GPTQ has to know of a layer's inputs, summed over their rows.

    Its memory is ``G n (n + C)`` numbers. :func:`round_columns` needs some ``2.5 G n^2`` more at its peak; for the
    widest convolution of Stable Diffusion 1.5 (``n`` = 23,040, float32) that is 2.2 GB here and 7.4 GB in all.

    Args:
        weight: The float weight, float32 ``[G, C, n]``: groups, output channels of a group, input columns.
        corrected: How much of the input's error the layer makes up for, ``alpha``.

    Attributes:
        hessian: ``X X^T``, ``[G, n, n]``: float64 up to :data:`MOST_EXACT` columns, float32 beyond.
        shift: ``alpha w (X_f - X) X^T``, ``[G, C, n]``, of the same dtype.
    """

    def __init__(self, weight: Tensor, corrected: float = CORRECTED) -> None:
        self.weight, self.corrected = weight, corrected
        groups, channels, columns = weight.shape
        dtype = torch.float64 if columns <= MOST_EXACT else torch.float32
        self.hessian = torch.zeros(groups, columns, columns, dtype=dtype)
        self.shift = torch.zeros(groups, channels, columns, dtype=dtype)

    def add(self, quantized: Tensor, original: Tensor | None) -> None:
        """Count rows in.

        Args:
            quantized: What the quantized model's layer sees, float32 ``[G, r, n]``.
            original: What the float model's layer sees in the same rows; None where it is the same.
        """
        if self.hessian.dtype == quantized.dtype:
            # In place: of a wide layer there is no room for a second one.
            self.hessian.baddbmm_(quantized.mT, quantized)
        else:
            self.hessian += quantized.mT @ quantized
        if original is not None:
            self.shift += self.corrected * ((original - quantized) @ self.weight.mT).mT @ quantized


def round_columns(
    moments: InputMoments, scale: Tensor, low: Tensor, high: Tensor, damping: float, tried: Sequence[float] = (1.0,)
) -> tuple[Tensor, Tensor]:
    """The integers of a layer, and of the scales that are tried those that leave each channel the least error.

    The range that suits rounding to nearest need not suit rounding that makes up for its errors.

    Args:
        moments: Of its inputs; its ``hessian`` is given up for the memory.
        scale: Of each output channel, ``[G, C, 1]``.
        low: Smallest integer of each channel, counted from its zero point, ``[G, C, 1]``.
        high: Largest.
        damping: What is added to the diagonal, relative to its mean.
        tried: What ``scale`` is multiplied by.

    Returns:
        Integers counted from the zero point, float32 ``[G, C, n]``, and their scales, ``[G, C, 1]``.

    Raises:
        ReconstructionError: The inputs are not finite, or so large that their squares are not.
    """
    hessian, dtype = moments.hessian, moments.hessian.dtype
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if not diagonal.isfinite().all():
        msg = "the squares of a layer's inputs overflow, so GPTQ cannot weigh them; use reconstruction='nearest'"
        raise ReconstructionError(msg)
    order = diagonal.argsort(dim=1, stable=True)
    # A group that has never seen anything but zeros is rounded to nearest.
    mean = diagonal.mean(1)
    mean = torch.where(mean > 0, mean, 1.0)
    del moments.hessian, diagonal
    for group, columns in zip(hessian, order, strict=True):
        group.copy_(group.index_select(0, columns).index_select(1, columns))
    factor = _factor(hessian, mean * damping)
    del hessian
    low, high = low.to(dtype), high.to(dtype)
    positions = order[:, None, :].expand(moments.shift.shape)
    shift = moments.shift.gather(2, positions)
    target = moments.weight.to(dtype).gather(2, positions)
    target += torch.cholesky_solve(shift.mT, factor).mT
    del shift
    rounded, chosen = torch.empty_like(target), scale.clone()
    least = torch.full_like(chosen, torch.inf, dtype=dtype)
    for share in tried:
        own = (scale * share).to(dtype)
        found = nearest_plane(target / own, factor, low, high)
        error = ((found * own - target) @ factor).square().sum(2, keepdim=True)
        better = ~(error >= least)  # not NaN either: the first one is always taken
        rounded, least = torch.where(better, found, rounded), torch.where(better, error, least)
        chosen = torch.where(better, scale * share, chosen)
    levels = torch.empty_like(rounded).scatter_(2, positions, rounded).to(torch.float32)
    return levels, chosen


def _factor(hessian: Tensor, damping: Tensor) -> Tensor:
    """The lower Cholesky factor of ``hessian + damping``, which is changed in place."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += damping[:, None]
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.any():
            return factor
        del factor
        diagonal += damping[:, None] * (MORE_DAMPING - 1.0)
        damping = damping * MORE_DAMPING


def nearest_plane(target: Tensor, factor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round ``target`` (``[G, C, n]``) from the last column to the first."""
    rounded, error = torch.empty_like(target), torch.zeros_like(target)
    for stop in range(target.shape[2], 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        relative = factor[:, start:, start:stop] / factor.diagonal(dim1=1, dim2=2)[:, None, start:stop]
        inner, outer = relative[:, : stop - start], relative[:, stop - start :]
        block = target[:, :, start:stop] - error[:, :, stop:] @ outer
        for column in range(stop - start - 1, -1, -1):
            chosen = block[:, :, column].round().clamp(low[:, :, 0], high[:, :, 0])
            rounded[:, :, start + column] = chosen
            wrong = chosen - target[:, :, start + column]
            error[:, :, start + column] = wrong
            block[:, :, :column] -= wrong[:, :, None] * inner[:, None, column, :column]
    return rounded
