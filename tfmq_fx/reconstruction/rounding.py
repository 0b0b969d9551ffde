"""Train the rounding of one weight: Adam on AdaRound's variables, in one fused step.

The gradient of the loss with respect to the soft weight comes from autograd; everything behind it (the
rectified sigmoid, the regulariser, Adam, the next soft weight) is elementwise, so its derivative is
written out here and done in one sweep over memory. That is what makes the large temporal block of a
Stable Diffusion UNet trainable on a CPU: autograd would sweep a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.fake_quantizers.adaround import GAMMA, ZETA, initial_variable, round_loss, soft_weight

__all__ = ["RoundingTrainer", "StepSize"]

#: Adam's constants (Kingma & Ba, 2015), torch's defaults.
DECAY_MEAN, DECAY_SQUARE, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class StepSize:
    """What changes from one iteration to the next.

    Attributes:
        rate: Adam's step size.
        beta: Exponent of the regulariser.
        round_weight: Weight of the regulariser; 0 during the warm-up.
    """

    rate: float
    beta: float
    round_weight: float


def _fused_step(
    variable: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    level: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bounds: Tensor,
    settings: Tensor,
    soft: Tensor,
) -> None:
    """One Adam step on ``variable`` and the soft weight after it; all ``[C, n]`` but the per-channel ``[C, 1]``.

    ``bounds`` holds ``(q_min, q_max)``; ``settings`` ``(rate, beta, round_weight, 1 - decay_mean^t,
    1 - decay_square^t)``. As tensors, because a compiled function would specialise on numbers.
    """
    rate, beta, weight, mean_correction, square_correction = settings.unbind()
    q_min, q_max = bounds.unbind()
    sigmoid = torch.sigmoid(variable)
    raw = sigmoid * (ZETA - GAMMA) + GAMMA
    h = raw.clamp(0.0, 1.0)
    slope = torch.where((raw > 0.0) & (raw < 1.0), sigmoid * (1.0 - sigmoid) * (ZETA - GAMMA), 0.0)
    position = level + h
    through = torch.where((position >= q_min) & (position <= q_max), gradient * scale, 0.0)
    centred = 2.0 * h - 1.0
    distance = centred.abs().clamp_min(1e-12)
    # d/dh (1 - |2h - 1|^beta) = -2 beta |2h - 1|^(beta - 1) sign(2h - 1); the power as an exponential,
    # which vectorises.
    pull = 2.0 * beta * torch.exp((beta - 1.0) * torch.log(distance)) * torch.sign(centred)
    total = (through - weight * pull) * slope
    new_mean = DECAY_MEAN * mean + (1.0 - DECAY_MEAN) * total
    new_square = DECAY_SQUARE * square + (1.0 - DECAY_SQUARE) * total * total
    step = rate * (new_mean / mean_correction) / (torch.sqrt(new_square / square_correction) + EPSILON)
    new = variable - step
    chosen = (torch.sigmoid(new) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
    weights = (torch.minimum(torch.maximum(level + chosen, q_min), q_max) - zero_point) * scale
    mean.copy_(new_mean)
    square.copy_(new_square)
    variable.copy_(new)
    soft.copy_(weights)


@cache
def _step_function(compiled: bool) -> Callable[..., Any]:
    return torch.compile(_fused_step, dynamic=True) if compiled else _fused_step


class RoundingTrainer:
    """Owns the variables of one weight while they are trained; use as a context manager.

    Inside the block the quantizer's output is a soft weight that collects gradients; at its end the
    choice becomes hard: up where ``h(V) >= 0.5``.

    Args:
        quantizer: The quantizer to train; it must have seen its weight.
        compiled: Whether to compile the fused step, which pays for more than some 10^5 weights.
    """

    def __init__(self, quantizer: AdaRoundQuantizer, *, compiled: bool) -> None:
        self.quantizer = quantizer
        self._step = _step_function(compiled)
        ratio = self._rows(quantizer.ratio())
        floor = ratio.floor()
        scale, zero = quantizer.scale[:, None], quantizer.zero_point[:, None].to(torch.float32)
        q_min, q_max = quantizer.bounds
        self.variable = initial_variable(ratio - floor)
        # A level more than one below the range stays clipped whatever h is, so it fits a byte.
        narrow = torch.int8 if quantizer.bits <= 7 or (quantizer.symmetric and quantizer.bits == 8) else torch.int32
        self.level = (floor + zero).clamp(q_min - 1, q_max).to(narrow)
        self.scale, self.zero_point = scale.contiguous(), zero.contiguous()
        self.bounds = torch.tensor([float(q_min), float(q_max)])
        self.mean = torch.zeros_like(self.variable)
        self.square = torch.zeros_like(self.variable)
        self.iterations = 0

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.quantizer.axis, 0).flatten(1).contiguous()

    def _shaped(self, rows: Tensor) -> Tensor:
        assert self.quantizer.weight is not None
        weight = self.quantizer.weight.movedim(self.quantizer.axis, 0)
        return rows.reshape(weight.shape).movedim(0, self.quantizer.axis)

    def __enter__(self) -> RoundingTrainer:
        """Give the quantizer a soft weight."""
        q_min, q_max = self.quantizer.bounds
        self.soft = soft_weight(self.variable, self.level, self.scale, self.zero_point, q_min, q_max)
        self.quantizer.soft = self._shaped(self.soft).requires_grad_()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the soft weight away; without an error, keep the learned choice."""
        self.quantizer.soft = None
        if error[0] is None:
            self.quantizer.up = self._shaped(self.variable >= 0).contiguous()

    def round_loss(self, beta: float) -> Tensor:
        """The regulariser now, a scalar."""
        return round_loss(self.variable, beta)

    @torch.no_grad()
    def step(self, size: StepSize) -> None:
        """Use the gradient that the soft weight has collected, and clear it."""
        soft = self.quantizer.soft
        assert soft is not None
        gradient = torch.zeros_like(soft) if soft.grad is None else soft.grad
        self.iterations += 1
        corrections = (1 - DECAY_MEAN**self.iterations, 1 - DECAY_SQUARE**self.iterations)
        settings = torch.tensor([size.rate, size.beta, size.round_weight, *corrections])
        self._step(
            self.variable,
            self.mean,
            self.square,
            self._rows(gradient),
            self.level,
            self.scale,
            self.zero_point,
            self.bounds,
            settings,
            self.soft,
        )
        soft.grad = None
