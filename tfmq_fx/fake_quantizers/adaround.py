r"""The mathematics of AdaRound: which of its two neighbours on the grid a weight is rounded to.

A weight :math:`w` with scale :math:`s` lies between :math:`s \lfloor w/s \rfloor` and the next grid point.
A variable :math:`V` per weight chooses, softly at first:

.. math::
    h(V) = \mathrm{clamp}(\sigma(V) (\zeta - \gamma) + \gamma, 0, 1), \quad \gamma = -0.1, \zeta = 1.1

    \hat w = s (\mathrm{clamp}(\lfloor w/s \rfloor + h(V) + z, q_{min}, q_{max}) - z)

    R_\beta(V) = \sum (1 - |2 h(V) - 1|^\beta)

At the start ``h(V)`` is the fraction of ``w/s``, so ``w_hat`` is the weight itself; the regulariser
``R`` drives ``h`` to 0 or 1 as ``beta`` falls. Source: Nagel et al., *Up or Down? Adaptive Rounding for
Post-Training Quantization*, ICML 2020, equations 22 to 24.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GAMMA", "ZETA", "annealed_beta", "initial_variable", "rectified_sigmoid", "round_loss", "soft_weight"]

#: The sigmoid is stretched beyond [0, 1] and clamped, so that exact 0 and 1 are within reach.
GAMMA, ZETA = -0.1, 1.1


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """``h(V)``: in [0, 1], any shape."""
    return (torch.sigmoid(variable) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def initial_variable(fraction: Tensor) -> Tensor:
    """The ``V`` with ``h(V) == fraction``.

    Args:
        fraction: ``w/s - floor(w/s)``, in [0, 1), any shape.
    """
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)


def soft_weight(variable: Tensor, level: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """``w_hat`` for a soft choice.

    Args:
        variable: ``V``, float, ``[C, n]``.
        level: ``floor(w/s) + z``, any dtype, ``[C, n]``.
        scale: ``s``, float, ``[C, 1]``.
        zero_point: ``z``, ``[C, 1]``.
        q_min: Smallest integer.
        q_max: Largest integer.
    """
    return ((level + rectified_sigmoid(variable)).clamp(q_min, q_max) - zero_point) * scale


def round_loss(variable: Tensor, beta: float) -> Tensor:
    """``R_beta(V)``, a scalar: 0 exactly when every ``h`` is 0 or 1."""
    return (1.0 - (2.0 * rectified_sigmoid(variable) - 1.0).abs().pow(beta)).sum()


def annealed_beta(iteration: int, iterations: int, warmup: float, start: float, end: float) -> float:
    """``beta`` at an iteration: ``start`` during the warm-up, then linear to ``end`` at the last one."""
    first = warmup * iterations
    if iteration < first or iterations <= first + 1:
        return start
    return start + (end - start) * (iteration - first) / (iterations - 1 - first)
