"""Train the rounding of weights: Adam on AdaRound's variables, in one fused step.

The gradient of the loss with respect to the soft weight comes from autograd; everything behind it (the
rectified sigmoid, the regulariser, Adam, the next soft weight) is elementwise, so its derivative is
written out here and done in one sweep over memory. That is what makes the large temporal block of a
Stable Diffusion UNet trainable on a CPU: autograd would sweep a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfmq_fx._torch.compilation import CompilerError, constant_floats
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.fake_quantizers.adaround import GAMMA, ZETA, initial_variable, rectified_sigmoid

__all__ = ["RoundingTrainer", "StepSize", "in_groups"]

#: Adam's constants (Kingma & Ba, 2015), torch's defaults.
DECAY_MEAN, DECAY_SQUARE, EPSILON = 0.9, 0.999, 1e-8
#: Values of small weights that share a buffer: beyond it, sweeping memory costs more than calling.
GROUP = 2**20
#: Where the variable of a clipped weight stays: ``h`` is exactly 0 or 1 beyond log 11.
OUT = 8.0


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
    sigmoid: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    level: Tensor,
    scale: Tensor,
    settings: Tensor,
    soft: Tensor,
    regularised: bool,
) -> None:
    """One Adam step on ``variable``, and its sigmoid and the soft weight after it, in place.

    ``settings`` holds ``(beta, round_weight, rate / (1 - decay_mean^t), 1 / (1 - decay_square^t))``: as a tensor,
    because a compiled function would specialise on numbers. ``regularised`` tells whether the weight is not 0: the
    power is a third of the step's cost.
    """
    beta, weight, corrected_rate, square_correction = settings.unbind()
    raw = sigmoid * (ZETA - GAMMA) + GAMMA
    h = raw.clamp(0.0, 1.0)
    total = gradient * scale
    if regularised:
        centred = 2.0 * h - 1.0
        distance = centred.abs().clamp_min(1e-12)
        # d/dh (1 - |2h - 1|^beta) = -2 beta |2h - 1|^(beta - 1) sign(2h - 1); the power as an exponential,
        # which vectorises.
        regularisation = (2.0 * beta * weight) * torch.exp((beta - 1.0) * torch.log(distance))
        total = total - torch.copysign(regularisation, centred)
    total = torch.where(raw == h, total * (sigmoid - sigmoid * sigmoid) * (ZETA - GAMMA), 0.0)
    new_mean = DECAY_MEAN * mean + (1.0 - DECAY_MEAN) * total
    new_square = DECAY_SQUARE * square + (1.0 - DECAY_SQUARE) * total * total
    new = variable - corrected_rate * new_mean / (torch.sqrt(new_square * square_correction) + EPSILON)
    new_sigmoid = torch.sigmoid(new)
    weights = (level + (new_sigmoid * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)) * scale
    mean.copy_(new_mean)
    square.copy_(new_square)
    variable.copy_(new)
    sigmoid.copy_(new_sigmoid)
    soft.copy_(weights)


@cache
def _step_function(compiled: bool) -> Callable[..., Any]:
    """The step, compiled where that is asked for and a C++ compiler is there."""
    if not compiled:
        return _fused_step
    fused: Callable[..., Any] = constant_floats()(torch.compile(_fused_step, dynamic=True))
    example = [*(torch.zeros(6) for _ in range(7)), torch.ones(4), torch.zeros(6)]
    try:
        fused(*example, regularised=False)
    except CompilerError:
        return _fused_step
    return fused


def in_groups(quantizers: Sequence[AdaRoundQuantizer]) -> list[list[AdaRoundQuantizer]]:
    """Small weights together, up to :data:`GROUP` values; large ones alone."""
    groups: list[list[AdaRoundQuantizer]] = []
    filled = 0
    for quantizer in quantizers:
        size = quantizer.up.numel()
        if not groups or filled + size > GROUP:
            groups.append([])
            filled = 0
        groups[-1].append(quantizer)
        filled += size
    return groups


class RoundingTrainer:
    """Owns the rounding variables of one or several weights while they are trained; a context manager.

    Inside the block each quantizer's output is a soft weight that collects gradients; at its end the
    choice becomes hard: up where ``h(V) >= 0.5``. Several weights lie one behind the other in flat buffers,
    so that a step costs one call for all of them.

    Args:
        quantizers: The quantizers to train, of any widths; each has seen its weight.
        compiled: Whether to compile the fused step.
        dtype: Of the soft weights and their gradients; everything else is float32.
    """

    def __init__(
        self, quantizers: Sequence[AdaRoundQuantizer], *, compiled: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.quantizers = list(quantizers)
        self.dtype = dtype
        self._step = _step_function(compiled)
        parts = [self._start(quantizer) for quantizer in self.quantizers]
        # Flat, the scale repeated for every weight: only loops over one and the same dimension are fused into one.
        flat = [[tensor.expand_as(part[0]).reshape(-1) for tensor in part] for part in parts]
        self.variable, self.level, self.scale = (torch.cat(column) for column in zip(*flat, strict=True))
        # Kept from step to step: every second exponential and division saved is a tenth of its time.
        self.sigmoid = torch.sigmoid(self.variable)
        self.mean = torch.zeros_like(self.variable)
        self.square = torch.zeros_like(self.variable)
        self.iterations = 0

    def _start(self, quantizer: AdaRoundQuantizer) -> tuple[Tensor, Tensor, Tensor]:
        """Variable and level, ``[C, n]``, and scale ``[C, 1]``; levels count from the zero point.

        Where both neighbours are clipped to one bound there is nothing to choose: the level is that bound, or the
        one before it, and the variable starts so far out that ``h`` is 0 or 1 and has no slope.
        """
        ratio = quantizer.ratio().movedim(quantizer.axis, 0).flatten(1).contiguous()
        floor = ratio.floor()
        q_min, q_max = quantizer.bounds
        low = (q_min - quantizer.zero_point)[:, None]
        high = low + (q_max - q_min)
        level = floor.clamp(low - 1, high)
        variable = initial_variable(ratio - floor)
        variable = torch.where(floor < low, OUT, torch.where(floor >= high, -OUT, variable))
        narrow = torch.int8 if int(level.min()) >= -128 and int(level.max()) <= 127 else torch.int32
        return variable, level.to(narrow), quantizer.scale[:, None].clone()

    def _pieces(self, whole: Tensor) -> list[Tensor]:
        """A buffer's views, one per quantizer, in the shape of its weight."""
        pieces = []
        flat = torch.split(whole, [quantizer.up.numel() for quantizer in self.quantizers])
        for quantizer, piece in zip(self.quantizers, flat, strict=True):
            shape = quantizer.up.movedim(quantizer.axis, 0).shape
            pieces.append(piece.view(shape).movedim(0, quantizer.axis))
        return pieces

    def __enter__(self) -> RoundingTrainer:
        """Give each quantizer a soft weight."""
        self.soft = ((self.level + rectified_sigmoid(self.variable)) * self.scale).to(self.dtype)
        for quantizer, piece in zip(self.quantizers, self._pieces(self.soft), strict=True):
            quantizer.soft = piece.detach().requires_grad_()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the soft weights away; without an error, keep the learned choice."""
        for quantizer, up in zip(self.quantizers, self._pieces(self.variable >= 0), strict=True):
            quantizer.soft = None
            if error[0] is None:
                quantizer.up = up.to(torch.int8).contiguous()

    def _gradient(self) -> Tensor:
        """What the soft weights have collected, in the order of the buffers; cleared."""
        pieces = []
        for quantizer in self.quantizers:
            soft = quantizer.soft
            if soft is None:
                msg = f"{quantizer.subject} has no soft weight to train; step only inside the trainer's with block"
                raise ReconstructionError(msg)
            gradient = torch.zeros_like(soft) if soft.grad is None else soft.grad
            pieces.append(gradient.movedim(quantizer.axis, 0).reshape(-1))
            soft.grad = None
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @torch.no_grad()
    def step(self, size: StepSize) -> None:
        """Use the gradients that the soft weights have collected."""
        self.iterations += 1
        rate = size.rate / (1 - DECAY_MEAN**self.iterations)
        correction = 1 / (1 - DECAY_SQUARE**self.iterations)
        settings = torch.tensor([size.beta, size.round_weight, rate, correction])
        self._step(
            self.variable,
            self.sigmoid,
            self.mean,
            self.square,
            self._gradient(),
            self.level,
            self.scale,
            settings,
            self.soft,
            regularised=size.round_weight != 0.0,
        )
