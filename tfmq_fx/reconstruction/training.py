"""The training loop that the temporal block and the other units share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from tfmq_fx.config.choices import Precision
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import ActivationQuantizer, AdaRoundQuantizer, TimestepQuantizer
from tfmq_fx.fake_quantizers.adaround import annealed_beta
from tfmq_fx.reconstruction.rounding import RoundingTrainer, StepSize, in_groups

__all__ = ["STEP_POWER", "WORTH_COMPILING", "train", "train_steps"]

#: Fewer weight updates than this in a whole run do not pay for compiling them, which takes some 20 s the first time.
WORTH_COMPILING = 2**30
#: What errors are raised to where step sizes are trained behind the weights (the public code of BRECQ).
STEP_POWER = 2.4


@torch.enable_grad()
def train(
    weights: Sequence[AdaRoundQuantizer],
    activations: Sequence[ActivationQuantizer | TimestepQuantizer],
    loss: Callable[[int], Tensor],
    iterations: int,
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None],
    *,
    precision: Precision,
    compiled: bool = False,
) -> None:
    """Learn the rounding of ``weights`` and, when configured, the step sizes of ``activations``.

    The loss is the reconstruction error; the rounding regulariser is added here. Afterwards every choice
    is hard. On an error or an interrupt the weights are rounded as before.

    Args:
        weights: The quantizers to train.
        activations: Quantizers whose step sizes are learned too where ``config.learned_steps`` is True.
        loss: Gives the reconstruction error of an iteration, a scalar that depends on the soft weights.
        iterations: Training steps.
        config: Step sizes and schedules.
        on_iteration: Called after each step with its number and loss.
        precision: What the loss and its gradients are computed in; the variables stay float32.
        compiled: Whether to compile the update of the weights (:data:`WORTH_COMPILING`).

    Raises:
        ReconstructionError: The loss is not finite.

    Source: Nagel et al., ICML 2020 (AdaRound); schedule and constants as in BRECQ (ICLR 2021).
    """
    steps = _StepTraining(activations if config.learned_steps is True else (), iterations, config)
    rate = config.rate(iterations)
    # Soft weights that are bfloat16 already need no casting in the loss, nor do their gradients behind it.
    dtype: torch.dtype = getattr(torch, precision)
    try:
        with ExitStack() as stack:
            groups = [RoundingTrainer(group, compiled=compiled, dtype=dtype) for group in in_groups(weights)]
            trainers = [stack.enter_context(trainer) for trainer in groups]
            for iteration in range(iterations):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                    error = loss(iteration)
                value = _finite(error)
                warm = iteration < config.warmup * iterations
                beta = annealed_beta(iteration, iterations, config.warmup, *config.beta)
                size = StepSize(rate, beta, 0.0 if warm else config.round_weight)
                error.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
                for trainer in trainers:
                    trainer.step(size)
                steps.step()
                on_iteration(iteration, value)
    finally:
        steps.keep()


@torch.enable_grad()
def train_steps(
    activations: Sequence[ActivationQuantizer | TimestepQuantizer],
    loss: Callable[[int], Tensor],
    iterations: int,
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None],
    *,
    precision: Precision,
) -> None:
    """Learn the step sizes of ``activations`` alone, behind weights whose rounding is final.

    Args:
        activations: The quantizers to train; of those that the error does not depend on nothing changes.
        loss: Gives the error of an iteration.
        iterations: Training steps.
        config: Has their step size.
        on_iteration: Called after each step with its number and loss.
        precision: What the loss and its gradients are computed in.

    Raises:
        ReconstructionError: The loss is not finite.

    Source: LSQ (ICLR 2020); as a phase of its own as in the public code of BRECQ (ICLR 2021).
    """
    steps = _StepTraining(activations, iterations, config)
    try:
        for iteration in range(iterations if activations else 0):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                error = loss(iteration)
            value = _finite(error)
            if error.requires_grad:
                error.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            steps.step()
            on_iteration(iteration, value)
    finally:
        steps.keep()


class _StepTraining:
    """The step sizes of activations while they are trained: Adam, annealed along a cosine."""

    def __init__(
        self,
        activations: Sequence[ActivationQuantizer | TimestepQuantizer],
        iterations: int,
        config: ReconstructionConfig,
    ) -> None:
        self.activations = activations
        learned = [quantizer.learn_step() for quantizer in activations]
        self.optimizer = torch.optim.Adam(learned, lr=config.step_learning_rate) if learned else None
        if self.optimizer:
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, iterations)

    def step(self) -> None:
        """Use the gradients that the step sizes have collected."""
        if self.optimizer:
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def keep(self) -> None:
        """Stop learning the step sizes and keep them."""
        for quantizer in self.activations:
            quantizer.keep_step()


def _finite(error: Tensor) -> float:
    value = error.item()
    if not math.isfinite(value):
        msg = "the reconstruction error became NaN or infinite; lower the learning rate or check batches"
        raise ReconstructionError(msg)
    return value
