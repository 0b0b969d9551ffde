"""Train the rounding of weights: Adam on AdaRound's variables, in one fused step.

The gradient of the loss with respect to the soft weight comes from autograd; everything behind it (the
rectified sigmoid, the regulariser, Adam, the next soft weight) is elementwise, so its derivative is
written out here and done in one sweep over memory. That is what makes the large temporal block of a
Stable Diffusion UNet trainable on a CPU: autograd would sweep a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.fake_quantizers.adaround import GAMMA, ZETA, initial_variable, rectified_sigmoid

__all__ = ["RoundingTrainer", "StepSize", "in_groups"]

#: Adam's constants (Kingma & Ba, 2015), torch's defaults.
DECAY_MEAN, DECAY_SQUARE, EPSILON = 0.9, 0.999, 1e-8
#: Values of small weights that share a buffer: beyond it, sweeping memory costs more than calling.
GROUP = 2**20


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
    low: Tensor,
    scale: Tensor,
    settings: Tensor,
    soft: Tensor,
    regularised: bool,
) -> None:
    """One Adam step on ``variable`` and the soft weight after it, in place.

    ``settings`` holds ``(q_max - q_min, beta, round_weight, rate / (1 - decay_mean^t), 1 / (1 - decay_square^t))``: as
    a tensor, because a compiled function would specialise on numbers. ``regularised`` tells whether the weight is not
    0: the power is a third of the step's cost.
    """
    width, beta, weight, corrected_rate, square_correction = settings.unbind()
    high = low + width
    sigmoid = torch.sigmoid(variable)
    raw = sigmoid * (ZETA - GAMMA) + GAMMA
    h = raw.clamp(0.0, 1.0)
    slope = torch.where(raw == h, sigmoid * (1.0 - sigmoid) * (ZETA - GAMMA), 0.0)
    position = level + h
    total = torch.where((position >= low) & (position <= high), gradient * scale, 0.0)
    if regularised:
        centred = 2.0 * h - 1.0
        distance = centred.abs().clamp_min(1e-12)
        # d/dh (1 - |2h - 1|^beta) = -2 beta |2h - 1|^(beta - 1) sign(2h - 1); the power as an exponential,
        # which vectorises.
        pull = 2.0 * beta * torch.exp((beta - 1.0) * torch.log(distance)) * torch.sign(centred)
        total = total - weight * pull
    total = total * slope
    new_mean = DECAY_MEAN * mean + (1.0 - DECAY_MEAN) * total
    new_square = DECAY_SQUARE * square + (1.0 - DECAY_SQUARE) * total * total
    step = corrected_rate * new_mean / (torch.sqrt(new_square * square_correction) + EPSILON)
    new = variable - step
    chosen = (torch.sigmoid(new) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
    weights = torch.minimum(torch.maximum(level + chosen, low), high) * scale
    mean.copy_(new_mean)
    square.copy_(new_square)
    variable.copy_(new)
    soft.copy_(weights)


@cache
def _step_function(compiled: bool) -> Callable[..., Any]:
    """The step, compiled where that is asked for and a C++ compiler is there."""
    if not compiled:
        return _fused_step
    fused: Callable[..., Any] = torch.compile(_fused_step, dynamic=True)
    probe = [*(torch.zeros(2, 3) for _ in range(7)), torch.ones(5), torch.zeros(2, 3)]
    try:
        fused(*probe, regularised=False)
    except torch._dynamo.exc.TorchDynamoException:
        return _fused_step
    return fused


def in_groups(quantizers: Sequence[AdaRoundQuantizer]) -> list[list[AdaRoundQuantizer]]:
    """Small weights of one width together, up to :data:`GROUP` values; large ones alone."""
    groups: list[list[AdaRoundQuantizer]] = []
    sizes: dict[tuple[int, int], int] = {}
    latest: dict[tuple[int, int], list[AdaRoundQuantizer]] = {}
    for quantizer in quantizers:
        width, size = quantizer.bounds, quantizer.up.numel()
        if width not in latest or sizes[width] + size > GROUP:
            latest[width], sizes[width] = [], 0
            groups.append(latest[width])
        latest[width].append(quantizer)
        sizes[width] += size
    return groups


class RoundingTrainer:
    """Owns the rounding variables of one or several weights while they are trained; a context manager.

    Inside the block each quantizer's output is a soft weight that collects gradients; at its end the
    choice becomes hard: up where ``h(V) >= 0.5``. Several weights lie one behind the other in flat buffers,
    so that a step costs one call for all of them.

    Args:
        quantizers: The quantizers to train, all with the same integer range; each has seen its weight.
        compiled: Whether to compile the fused step.
        dtype: Of the soft weights and their gradients; everything else is float32.
    """

    def __init__(
        self, quantizers: Sequence[AdaRoundQuantizer], *, compiled: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.quantizers = list(quantizers)
        self.dtype = dtype
        self._step = _step_function(compiled)
        q_min, q_max = self.quantizers[0].bounds
        self._width = float(q_max - q_min)
        parts = [self._start(quantizer) for quantizer in self.quantizers]
        if len(parts) == 1:
            self.variable, self.level, self.low, self.scale = parts[0]
        else:
            flat = [[tensor.expand_as(part[0]).reshape(-1) for tensor in part] for part in parts]
            self.variable, self.level, self.low, self.scale = (torch.cat(column) for column in zip(*flat, strict=True))
        self.mean = torch.zeros_like(self.variable)
        self.square = torch.zeros_like(self.variable)
        self.iterations = 0
        self._next: StepSize | None = None
        self._missing = len(self.quantizers)

    def _start(self, quantizer: AdaRoundQuantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Variable and level ``[C, n]``, lower bound and scale ``[C, 1]``; levels count from the zero point."""
        ratio = quantizer.ratio().movedim(quantizer.axis, 0).flatten(1).contiguous()
        floor = ratio.floor()
        q_min, q_max = quantizer.bounds
        low = (q_min - quantizer.zero_point)[:, None]
        # A level more than one below the range stays clipped whatever h is; so up to 8 bits it fits a byte.
        level = floor.clamp(low - 1, low + (q_max - q_min))
        narrow = torch.int8 if int(level.min()) >= -128 and int(level.max()) <= 127 else torch.int32
        return initial_variable(ratio - floor), level.to(narrow), low.to(narrow), quantizer.scale[:, None].clone()

    def _pieces(self, whole: Tensor) -> list[Tensor]:
        """A buffer's views, one per quantizer, in the shape of its weight."""
        pieces = []
        flat = torch.split(whole.view(-1), [quantizer.up.numel() for quantizer in self.quantizers])
        for quantizer, piece in zip(self.quantizers, flat, strict=True):
            shape = quantizer.up.movedim(quantizer.axis, 0).shape
            pieces.append(piece.view(shape).movedim(0, quantizer.axis))
        return pieces

    def __enter__(self) -> RoundingTrainer:
        """Give each quantizer a soft weight."""
        high = self.low + self._width
        soft = torch.minimum(torch.maximum(self.level + rectified_sigmoid(self.variable), self.low), high)
        self.soft = (soft * self.scale).to(self.dtype)
        for quantizer, piece in zip(self.quantizers, self._pieces(self.soft), strict=True):
            quantizer.soft = piece.detach().requires_grad_()
            quantizer.soft.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Take the soft weights away; without an error, keep the learned choice."""
        for quantizer, up in zip(self.quantizers, self._pieces(self.variable >= 0), strict=True):
            quantizer.soft = None
            if error[0] is None:
                quantizer.up = up.contiguous().clone()

    def _gradient(self) -> Tensor:
        """What the soft weights have collected, in the order of the buffers; cleared."""
        pieces = []
        for quantizer in self.quantizers:
            soft = quantizer.soft
            assert soft is not None
            gradient = torch.zeros_like(soft) if soft.grad is None else soft.grad
            pieces.append(gradient.movedim(quantizer.axis, 0).reshape(-1))
            soft.grad = None
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view_as(self.variable)

    def _arrived(self, _: Tensor) -> None:
        self._missing -= 1
        if self._next is not None and not self._missing:
            self.step(self._next)

    @contextmanager
    def stepping(self, size: StepSize) -> Iterator[None]:
        """A step during the one backward pass inside the block.

        It is taken as soon as the last gradient is there, when nothing reads the weight any more: the gradient
        is still in the cache, and its memory serves the next one instead of being asked from the system anew.
        """
        self._next, self._missing = size, len(self.quantizers)
        steps = self.iterations
        try:
            yield
            if self.iterations == steps:  # some weight does not reach the loss
                self.step(size)
        finally:
            self._next = None

    @torch.no_grad()
    def step(self, size: StepSize) -> None:
        """Use the gradients that the soft weights have collected."""
        self.iterations += 1
        rate = size.rate / (1 - DECAY_MEAN**self.iterations)
        correction = 1 / (1 - DECAY_SQUARE**self.iterations)
        settings = torch.tensor([self._width, size.beta, size.round_weight, rate, correction])
        self._step(
            self.variable,
            self.mean,
            self.square,
            self._gradient(),
            self.level,
            self.low,
            self.scale,
            settings,
            self.soft,
            regularised=size.round_weight != 0.0,
        )
