r"""How a step of DDPM or DDIM depends on the model's output, and how much fresh noise it adds.

Both write :math:`x_{t-1} = a\,\hat x_0 + b\,x_t + c\,\hat\epsilon + \sigma z` with :math:`\hat x_0` and
:math:`\hat\epsilon` linear in the model's output :math:`o`. ``response`` is :math:`\partial x_{t-1}/\partial o`, so an
error of variance :math:`v` in the output adds ``response ** 2 * v`` to the variance of the next state, wherever
:math:`\hat x_0` is not clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import ConfigError

__all__ = ["DDIMSchedule", "DDPMSchedule", "StepCoefficients", "ddim_coefficients", "ddpm_coefficients"]


@dataclass(frozen=True)
class StepCoefficients:
    """The numbers of one step.

    Attributes:
        original: Factor of the predicted ``x_0``.
        sample: Factor of ``x_t`` (DDPM).
        sigma: Standard deviation of the fresh noise.
        response: Derivative of the next state by the model's output.
    """

    original: float
    sample: float
    sigma: float
    response: float


class DDIMSchedule(Scheduler, Protocol):
    """What a ``DDIMScheduler`` has beyond any scheduler.

    Attributes:
        alphas_cumprod: The share of the signal's variance per training timestep, ``[T]``.
        final_alpha_cumprod: That behind the last step.
        num_inference_steps: The steps of the walk.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    num_inference_steps: int


class DDPMSchedule(Scheduler, Protocol):
    """What a ``DDPMScheduler`` has beyond any scheduler.

    Attributes:
        alphas_cumprod: The share of the signal's variance per training timestep, ``[T]``.
    """

    alphas_cumprod: Tensor

    def previous_timestep(self, timestep: int, /) -> int | Tensor:
        """The timestep that follows on the walk; negative behind the last."""
        ...


def _derivatives(prediction: str, alpha: float) -> tuple[float, float]:
    """Of the predicted ``x_0`` and noise by the model's output; ``alpha`` is the cumulative product at ``t``."""
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction == "epsilon":
        return -noise / signal, 1.0
    if prediction == "v_prediction":
        return -noise, signal
    if prediction == "sample":
        return 1.0, -signal / noise
    msg = f"prediction_type={prediction!r} is not supported: use one of 'epsilon', 'v_prediction', 'sample'"
    raise ConfigError(msg)


def ddim_coefficients(scheduler: DDIMSchedule, timestep: int, eta: float) -> StepCoefficients:
    """Of a step of ``DDIMScheduler`` (Song et al., 2021, eq. 12 and 16).

    Raises:
        ConfigError: The scheduler's ``prediction_type`` is not known.
    """
    alphas = scheduler.alphas_cumprod
    previous = timestep - scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
    alpha = float(alphas[timestep])
    alpha_previous = float(alphas[previous] if previous >= 0 else scheduler.final_alpha_cumprod)
    sigma = eta * math.sqrt((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous))
    direction = math.sqrt(max(0.0, 1 - alpha_previous - sigma**2))
    by_original, by_noise = _derivatives(scheduler.config["prediction_type"], alpha)
    original = math.sqrt(alpha_previous)
    return StepCoefficients(original, 0.0, sigma, original * by_original + direction * by_noise)


def ddpm_coefficients(scheduler: DDPMSchedule, timestep: int) -> StepCoefficients:
    """Of a step of ``DDPMScheduler`` with a fixed variance (Ho et al., 2020, eq. 7).

    Raises:
        ConfigError: The scheduler's ``prediction_type`` is not known.
    """
    alphas = scheduler.alphas_cumprod
    previous = int(scheduler.previous_timestep(timestep))
    alpha = float(alphas[timestep])
    alpha_previous = float(alphas[previous]) if previous >= 0 else 1.0
    ratio = alpha / alpha_previous
    small = (1 - alpha_previous) / (1 - alpha) * (1 - ratio)
    variance = 1 - ratio if scheduler.config["variance_type"] == "fixed_large" else small
    by_original, _ = _derivatives(scheduler.config["prediction_type"], alpha)
    original = math.sqrt(alpha_previous) * (1 - ratio) / (1 - alpha)
    sample = math.sqrt(ratio) * (1 - alpha_previous) / (1 - alpha)
    return StepCoefficients(original, sample, math.sqrt(variance) if timestep > 0 else 0.0, original * by_original)
