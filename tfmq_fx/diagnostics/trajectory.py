r"""Trajectory deviation: how the quantized denoiser parts from the float one, step by step.

Both start from the same noise and run deterministic DDIM (Song et al., 2021; eta 0). After each step:

.. math:: \lVert \hat x_t - x_t \rVert / \lVert x_t \rVert

The set-up is that of TFMQ-DM (CVPR 2024, section 4), which quantizes the temporal block alone; the norm is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.data.prediction import predicted
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.diagnostics.comparison import ddim_scheduler, psnr
from tfmq_fx.diagnostics.json_values import numbers, tensor
from tfmq_fx.diagnostics.vectors import ratio
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.surroundings import in_plain_surroundings

__all__ = ["Trajectory", "TrajectoryDeviation", "compare_trajectories", "record_trajectory", "trajectory_deviation"]

#: Called as ``denoiser(sample, timestep)`` with a 0-dim timestep, like a diffusers model.
Denoiser = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The states of a sampling run.

    Attributes:
        timesteps: What the denoiser was called with at each step, float64 ``[S]``.
        states: The noise, then the state after each step, ``[S + 1, N, ...]``.
    """

    timesteps: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class TrajectoryDeviation:
    """How far one trajectory is from another after each step.

    Attributes:
        timesteps: The timestep of each step, float64 ``[S]``.
        relative: ``|x_hat - x| / |x|`` of each sample after each step, float64 ``[S, N]``.
        psnr: Of each final image against the reference's, in decibels, float64 ``[N]``; infinite for equal images.
    """

    timesteps: Tensor
    relative: Tensor
    psnr: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over the samples, ``[S]``."""
        return self.relative.mean(dim=1)

    def quantile(self, q: float) -> Tensor:
        """A quantile over the samples, 0 to 1, ``[S]``."""
        return self.relative.quantile(q, dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "timesteps": numbers(self.timesteps),
            "relative": numbers(self.relative),
            "psnr": numbers(self.psnr),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrajectoryDeviation:
        """The inverse of :meth:`to_dict`."""
        return cls(**{name: tensor(values[name]) for name in ("timesteps", "relative", "psnr")})


@in_plain_surroundings
@torch.no_grad()
def record_trajectory(
    denoiser: Denoiser,
    scheduler: Scheduler | Mapping[str, Any],
    *,
    steps: int,
    noise: Tensor,
    on_step: Callable[[], None] | None = None,
) -> Trajectory:
    """Sample by deterministic DDIM and keep every state.

    Args:
        denoiser: Any callable ``denoiser(sample, timestep)`` that returns a tensor, a tuple or an output
            object with a ``sample``; the timestep is a 0-dim tensor.
        scheduler: A diffusers scheduler, or its configuration as a mapping; it gives the noise schedule.
        steps: Sampling steps ``S``.
        noise: Standard normal noise, ``[N, C, ...]``.
        on_step: Called after every step, for progress bars.

    Raises:
        ConfigError: The steps are not possible with this schedule, or there is no sample.
    """
    if len(noise) == 0:
        msg = "a trajectory needs at least one sample of noise"
        raise ConfigError(msg)
    ddim = ddim_scheduler(scheduler, steps)
    x: Tensor = noise * ddim.init_noise_sigma
    states = [x]
    for timestep in ddim.timesteps:
        x = ddim.step(predicted(denoiser(x, timestep), x.shape[1]), timestep, x).prev_sample
        states.append(x)
        if on_step is not None:
            on_step()
    return Trajectory(ddim.timesteps.double(), torch.stack(states))


def trajectory_deviation(reference: Trajectory, other: Trajectory) -> TrajectoryDeviation:
    """Compare two trajectories that started from the same noise, in float64.

    Args:
        reference: The float one.
        other: The quantized one.

    Raises:
        ConfigError: They have other steps or shapes, or started from other noise.
    """
    same = torch.equal(reference.timesteps, other.timesteps) and reference.states.shape == other.states.shape
    if not same or not torch.equal(reference.states[0], other.states[0]):
        msg = "the trajectories do not start from the same noise with the same steps, so they cannot be compared"
        raise ConfigError(msg)
    x, x_hat = reference.states[1:].double().flatten(2), other.states[1:].double().flatten(2)
    relative = ratio((x_hat - x).norm(dim=2), x.norm(dim=2))
    decibels = psnr(reference.states[-1], other.states[-1])
    return TrajectoryDeviation(reference.timesteps.cpu(), relative.cpu(), decibels.cpu())


@in_plain_surroundings
def compare_trajectories(
    denoiser: Denoiser,
    quantized: Denoiser,
    scheduler: Scheduler | Mapping[str, Any],
    *,
    steps: int,
    noise: Tensor,
    on_step: Callable[[], None] | None = None,
) -> TrajectoryDeviation:
    """Sample with both denoisers from the same noise and compare the two trajectories.

    Args:
        denoiser: The float one (:func:`record_trajectory` says how it is called).
        quantized: The quantized one.
        scheduler: A diffusers scheduler, or its configuration as a mapping.
        steps: Sampling steps ``S``.
        noise: Standard normal noise, ``[N, C, ...]``.
        on_step: Called after every step of either, ``2 S`` times.

    Raises:
        ConfigError: The steps are not possible with this schedule, or there is no sample.

    Source: the set-up is that of TFMQ-DM (CVPR 2024), section 4; the norm is ours.
    """
    reference, other = (
        record_trajectory(run, scheduler, steps=steps, noise=noise, on_step=on_step) for run in (denoiser, quantized)
    )
    return trajectory_deviation(reference, other)
