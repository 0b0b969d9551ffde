r"""PTQD's correction of the quantization noise, around a diffusers scheduler.

With the noise statistics :math:`k_t, \mu_t, \sigma_{q,t}^2` (:mod:`tfmq_fx.schedulers.noise_statistics`):

.. math:: \epsilon_t \leftarrow \frac{\hat\epsilon_t - \mu_t}{1 + k_t}, \qquad
          \sigma_t'^2 = \max\Bigl(0, \sigma_t^2 - \lambda_t^2 \frac{\sigma_{q,t}^2}{(1 + k_t)^2}\Bigr)

where :math:`\lambda_t` is how strongly the next state follows the model's output. Only the fresh noise shrinks to
:math:`\sigma_t'`; the direction coefficient of DDIM keeps :math:`\sigma_t`.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import ConfigError
from tfmq_fx.schedulers.noise_statistics import NoiseStatistics
from tfmq_fx.schedulers.step_coefficients import (
    DDIMSchedule,
    DDPMSchedule,
    StepCoefficients,
    ddim_coefficients,
    ddpm_coefficients,
)
from tfmq_fx.schedulers.timestep_rows import check_schedule, find_row
from tfmq_fx.schedulers.wrapper import SchedulerWrapper, with_sample

__all__ = ["PTQDScheduler"]

DDPM, DDIM = "DDPMScheduler", "DDIMScheduler"
#: Their steps add no noise, so slope and bias are all there is to correct.
DETERMINISTIC = (
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
#: Variances of DDPM that do not depend on the model.
FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
WHAT = "the noise statistics"


class PTQDScheduler(SchedulerWrapper):
    """Corrects a quantized denoiser's output and the noise that the sampler adds to it.

    DDPM and DDIM get the whole correction (at eta 0 there is no noise to shrink); PNDM, Euler, Heun, DPM-Solver and
    UniPC, which are deterministic, that of slope and bias. It works in terms of what the model predicts: noise,
    velocity or the clean sample. Everything else is the inner scheduler's.

    Args:
        scheduler: A diffusers scheduler; it is not copied.
        statistics: From :func:`tfmq_fx.schedulers.collect_noise_statistics`, for this scheduler, its steps and eta.
            DDIM steps with their eta unless told another, which is an error.

    Raises:
        ConfigError: The scheduler is not one of those, draws its variance from the model, or the statistics are
            another's.
        TimestepError: From ``set_timesteps`` and ``step``, for a timestep that the statistics do not have.

    Source: PTQD (He et al., NeurIPS 2023), sections 4.2 and 4.3. Where the scheduler clips the predicted clean sample,
    less of the noise arrives than is subtracted; the paper leaves that out too.
    """

    def __init__(self, scheduler: Scheduler, statistics: NoiseStatistics) -> None:
        super().__init__(scheduler)
        _check(scheduler, statistics)
        self.statistics = statistics

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the inner scheduler's.

        Raises:
            TimestepError: A timestep has no statistics.
        """
        self.scheduler.set_timesteps(*args, **kwargs)
        check_schedule(self.scheduler.timesteps, self.statistics.timesteps, WHAT)

    def take_step(self, arguments: dict[str, Any]) -> Any:
        """Step from the corrected output, with the noise that is missing.

        Raises:
            TimestepError: The timestep has no statistics.
            ConfigError: Another eta than that of the statistics is asked for, or the output has other channels.
        """
        row = find_row(self.statistics.timesteps, arguments["timestep"], WHAT)
        arguments = {**arguments, "model_output": self._corrected(arguments["model_output"], row)}
        kind = type(self.scheduler).__name__
        if kind == DDIM:
            return self._ddim(arguments, row)
        if kind == DDPM:
            return self._ddpm(arguments, row)
        return self.scheduler.step(**arguments)

    def _corrected(self, output: Tensor, row: int) -> Tensor:
        bias = self.statistics.bias[row].to(output)
        if output.ndim < 2 or output.shape[1] != len(bias):
            msg = f"the model's output has shape {list(output.shape)}, but {WHAT} are of {len(bias)} channels"
            raise ConfigError(msg)
        bias = bias.reshape(1, -1, *[1] * (output.ndim - 2))
        return (output - bias) / (1 + float(self.statistics.slope[row]))

    def _noise_left(self, coefficients: StepCoefficients, row: int) -> float:
        """``sigma' / sigma``: the share of the fresh noise that is still to be added."""
        if coefficients.sigma == 0:
            return 1.0
        added = (coefficients.response / (1 + float(self.statistics.slope[row]))) ** 2 * float(
            self.statistics.variance[row]
        )
        return math.sqrt(max(0.0, 1 - added / coefficients.sigma**2))

    def _ddim(self, arguments: dict[str, Any], row: int) -> Any:
        eta = self.statistics.eta
        if arguments.setdefault("eta", eta) != eta:
            msg = f"step was called with eta={arguments['eta']:g}, but {WHAT} are for eta={eta:g}: collect them for it"
            raise ConfigError(msg)
        if eta > 0:
            output = arguments["model_output"]
            noise = arguments.get("variance_noise")
            if noise is None:
                from diffusers.utils.torch_utils import randn_tensor  # whose user has imported diffusers

                generator = arguments.pop("generator", None)
                noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
            schedule = cast("DDIMSchedule", self.scheduler)
            left = self._noise_left(ddim_coefficients(schedule, int(arguments["timestep"]), eta), row)
            arguments["variance_noise"] = noise * left
        return self.scheduler.step(**arguments)

    def _ddpm(self, arguments: dict[str, Any], row: int) -> Any:
        output = self.scheduler.step(**arguments)
        coefficients = ddpm_coefficients(cast("DDPMSchedule", self.scheduler), int(arguments["timestep"]))
        left = self._noise_left(coefficients, row)
        if left == 1.0:
            return output
        # DDPM draws its noise inside; what is not the mean is the noise.
        following, original = output if isinstance(output, tuple) else (output.prev_sample, output.pred_original_sample)
        mean = coefficients.original * original + coefficients.sample * arguments["sample"]
        return with_sample(output, torch.lerp(mean, following, left))


def _check(scheduler: Scheduler, statistics: NoiseStatistics) -> None:
    name = type(scheduler).__name__
    if isinstance(scheduler, SchedulerWrapper):
        msg = f"PTQDScheduler goes around the diffusers scheduler itself, not around a {name}: wrap them in that order"
        raise ConfigError(msg)
    if name not in (DDPM, DDIM, *DETERMINISTIC):
        msg = f"PTQD cannot correct a {name}: use one of {', '.join((DDPM, DDIM, *DETERMINISTIC))}"
        raise ConfigError(msg)
    config = scheduler.config
    if str(config.get("algorithm_type", "")).startswith("sde"):
        msg = f"PTQD cannot correct algorithm_type={config['algorithm_type']!r}: use the deterministic 'dpmsolver++'"
        raise ConfigError(msg)
    if name == DDPM and config["variance_type"] not in FIXED:
        msg = f"PTQD cannot correct variance_type={config['variance_type']!r}: use one of {', '.join(map(repr, FIXED))}"
        raise ConfigError(msg)
    prediction = str(config.get("prediction_type", ""))
    eta = {DDPM: 1.0, DDIM: statistics.eta}.get(name, 0.0)
    actual, expected = (name, prediction, eta), (statistics.scheduler, statistics.prediction, statistics.eta)
    if actual != expected:
        what, of = ("{} (prediction_type {!r}, eta {:g})".format(*key) for key in (actual, expected))
        msg = f"the noise statistics are of {of}, not of {what}: collect them for the scheduler that you sample with"
        raise ConfigError(msg)
