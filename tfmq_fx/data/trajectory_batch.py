"""A batch of trajectories that is walked from noise to image, step by step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.data.model_inputs import ModelInputs
from tfmq_fx.data.prediction import predicted
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import CalibrationError, ConfigError

__all__ = ["Step", "TrajectoryBatch", "started_copy"]


def started_copy(scheduler: Scheduler, steps: int) -> Scheduler:
    """A copy of the scheduler that stands at the start; solvers keep a history, so each walk needs its own.

    Raises:
        ConfigError: It is no scheduler, or cannot make this many steps.
    """
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        msg = f"a {type(scheduler).__name__} is no scheduler: it has no set_timesteps and step"
        raise ConfigError(msg)
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError) as error:
        msg = f"{type(scheduler).__name__} cannot make {steps} steps: {_first_line(error)}"
        raise ConfigError(msg) from error
    return scheduler


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Step:
    """What one step of a walk went through.

    Attributes:
        state: The state before it, ``[N, C, ...]``.
        model_input: What the denoiser saw of that, ``[N, C, ...]``.
        prediction: What it predicted, ``[N, C, ...]``; with learned variance, ``[N, 2 C, ...]``.
        following: The state after it, ``[N, C, ...]``.
    """

    state: Tensor
    model_input: Tensor
    prediction: Tensor
    following: Tensor


class TrajectoryBatch:
    """One batch of trajectories on its way from noise to image.

    Args:
        model: The denoiser, called with its inputs by name.
        scheduler: A scheduler at its start (:func:`started_copy`); it is the walk's own.
        inputs: How the denoiser is called.
        trajectories: Which trajectories these are, of those that ``inputs`` are for, int64 ``[N]``.
        noise: Standard normal noise to start from, ``[N, C, ...]``, on the denoiser's device.
        generator: What stochastic samplers draw from.
        options: Further arguments of the scheduler's ``step``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Scheduler,
        inputs: ModelInputs,
        trajectories: Tensor,
        noise: Tensor,
        generator: torch.Generator,
        **options: Any,
    ) -> None:
        self.model, self.scheduler, self.inputs, self.trajectories = model, scheduler, inputs, trajectories
        #: Where the walk is, ``[N, C, ...]``.
        self.state: Tensor = noise * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self.options = {**options, "generator": generator} if takes_generator else options
        # Of diffusers' schedulers only those with this attribute read a learned variance.
        self.keep_variance = str(scheduler.config.get("variance_type", "")).startswith("learned")

    def advance(self, timestep: Tensor) -> Step:
        """Go one step.

        Args:
            timestep: The schedule's next one, 0-dim, on the denoiser's device.

        Raises:
            CalibrationError: The model cannot be called so, or the next state is NaN or infinite.
        """
        x = self.state
        model_input = self.scheduler.scale_model_input(x, timestep)
        arguments = self.inputs.bind(model_input, timestep, self.trajectories)
        try:
            output = self.model(**arguments)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            names = ", ".join(arguments)
            msg = f"{type(self.model).__name__} cannot be called with ({names}): {_first_line(error)}"
            raise CalibrationError(msg) from error
        prediction = predicted(output, x.shape[1], keep_variance=self.keep_variance)
        following = self.scheduler.step(prediction, timestep, x, **self.options).prev_sample
        if not bool(torch.isfinite(following).all()):
            msg = (
                f"a trajectory became NaN or infinite at timestep {float(timestep):g}; "
                "check the model's weights and that the scheduler is the one it was trained with"
            )
            raise CalibrationError(msg)
        self.state = following
        return Step(x, model_input, prediction, following)
