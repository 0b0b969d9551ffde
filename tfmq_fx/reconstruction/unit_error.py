"""The reconstruction error of a unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.passes.support.predicates import is_conv, is_weighted

__all__ = ["channel_axis", "raised", "unit_error"]


def channel_axis(unit: fx.Graph, ndim: int) -> int:
    """The axis of a unit's output that holds channels: the last one where a linear comes last, else axis 1.

    Token tensors are ``[N, L, C]``, images ``[N, C, H, W]``; summing over the wrong axis would weigh the
    error against the rounding regulariser by ``L / C``.
    """
    weighted = [node for node in unit.nodes if is_weighted(node)]
    if ndim <= 2 or not weighted:
        return ndim - 1
    return 1 if is_conv(weighted[-1]) or ndim > 3 else ndim - 1


def raised(errors: Tensor, power: float) -> Tensor:
    """``|errors|^power``, element by element."""
    return errors.square() if power == 2.0 else errors.abs().pow(power)


def unit_error(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    axes: Sequence[int],
    fisher: Sequence[Tensor | None],
    power: float = 2.0,
) -> Tensor:
    """``sum over outputs, mean over all but channels, sum over channels of F |out - target|^power``: a scalar.

    Args:
        outputs: What the quantized unit gives.
        targets: What the float unit gives.
        axes: The channel axis of each output.
        fisher: Diagonal Fisher information of each output (BRECQ, ICLR 2021, equation 10), its mean 1, of
            the output's shape but for axis 0; None weighs all alike.
        power: What errors are raised to.
    """
    errors = []
    for output, target, axis, weight in zip(outputs, targets, axes, fisher, strict=True):
        powers = raised(output.to(target.dtype) - target, power)
        if weight is not None:
            powers = powers * weight
        errors.append(powers.sum() * output.shape[axis] / output.numel())
    return torch.stack(errors).sum()
