"""Which timesteps calibration data comes from: a strategy that draws positions on a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.support.timestep_values import ValueSearch

__all__ = ["NormalTimesteps", "TimestepSampler", "UniformTimesteps", "place_samples", "resolve_sampler"]


@runtime_checkable
class TimestepSampler(Protocol):
    """Draws the steps of a schedule that calibration samples are taken from; write your own to weigh them."""

    def draw(self, timesteps: Tensor, count: int, horizon: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` positions on the schedule, repeats allowed.

        Args:
            timesteps: The timesteps of the schedule in visiting order, float64 ``[S]``; large is noisy.
            count: How many positions to draw.
            horizon: Number of training timesteps ``T`` that the values of ``timesteps`` count in.
            generator: The only source of randomness.

        Returns:
            Positions into ``timesteps``, int64 ``[count]``, each in ``0 .. S - 1``. Where a step is asked
            for more often than there are trajectories, the surplus is drawn again without that step.
        """
        ...


@dataclass(frozen=True)
class UniformTimesteps:
    """Every step of the schedule equally often; what is left over after whole rounds is drawn at random."""

    def draw(self, timesteps: Tensor, count: int, horizon: int, generator: torch.Generator) -> Tensor:
        """As in :class:`TimestepSampler`."""
        steps = len(timesteps)
        rounds, rest = divmod(count, steps)
        return torch.cat([torch.arange(steps).repeat(rounds), torch.randperm(steps, generator=generator)[:rest]])


@dataclass(frozen=True)
class NormalTimesteps:
    """PTQ4DM's normally distributed time-step calibration (NDTC): ``t ~ N(mu, (T / 2)^2)``, ``mu <= T / 2``.

    ``t`` counts the noise level, so a mean below ``T / 2`` leans towards clean samples. Draws outside
    ``[0, T - 1]`` are drawn again, and each goes to the nearest step of the schedule. This is the
    distribution of the paper (PTQ4DM, CVPR 2023); its released code mirrors the time
    direction and clamps, which piles draws up at both ends.

    Attributes:
        mean: ``mu / T``, in ``[0, 0.5]``.

    Raises:
        ConfigError: The mean is outside its interval, or the schedule's timesteps are not in ``[0, T]``.
    """

    mean: float = 0.4

    def __post_init__(self) -> None:
        """Check the mean."""
        number = isinstance(self.mean, (int, float)) and not isinstance(self.mean, bool)
        if not number or not 0.0 <= self.mean <= 0.5:
            msg = (
                f"the NDTC mean is {self.mean!r}, but it is a share of T from 0 to 0.5: it leans towards clean samples"
            )
            raise ConfigError(msg)

    def draw(self, timesteps: Tensor, count: int, horizon: int, generator: torch.Generator) -> Tensor:
        """As in :class:`TimestepSampler`."""
        if float(timesteps.min()) < 0 or float(timesteps.max()) > horizon:
            msg = (
                f"NDTC needs timesteps from 0 to {horizon}, but this schedule runs from {float(timesteps.min()):g} "
                f"to {float(timesteps.max()):g}; use the uniform sampler"
            )
            raise ConfigError(msg)
        accepted = torch.empty(0, dtype=torch.float64)
        while len(accepted) < count:
            # From 48 % (mu = 0) to 68 % (mu = T/2) of the distribution lies inside, so twice the count mostly does.
            drawn = torch.randn(2 * count, dtype=torch.float64, generator=generator) * (horizon / 2)
            drawn += self.mean * horizon
            accepted = torch.cat([accepted, drawn[(drawn >= 0) & (drawn <= horizon - 1)]])
        positions, _ = ValueSearch(timesteps.to(torch.float64)).nearest(accepted[:count])
        return positions


SAMPLERS: dict[str, type[UniformTimesteps] | type[NormalTimesteps]] = {
    "uniform": UniformTimesteps,
    "ndtc": NormalTimesteps,
}


def resolve_sampler(sampler: str | TimestepSampler) -> TimestepSampler:
    """Return the sampler with this name, or the given one.

    Raises:
        ConfigError: There is no sampler with this name, or the object cannot draw.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            msg = f"sampler={sampler!r} is not supported: use one of {', '.join(map(repr, SAMPLERS))}"
            raise ConfigError(msg)
        return SAMPLERS[sampler]()
    if not isinstance(sampler, TimestepSampler):
        msg = f"sampler is a {type(sampler).__name__}, which has no draw method; see tfmq_fx.TimestepSampler"
        raise ConfigError(msg)
    return sampler


def place_samples(
    sampler: TimestepSampler,
    timesteps: Tensor,
    count: int,
    capacity: Tensor,
    horizon: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw how many samples each step of a schedule gives, none above its capacity.

    Args:
        sampler: The strategy.
        timesteps: The schedule in visiting order, ``[S]``.
        count: Samples in total; at most ``capacity.sum()``.
        capacity: Samples that each step has to give, int64 ``[S]``.
        horizon: Number of training timesteps ``T``.
        generator: The only source of randomness.

    Returns:
        Samples per step, int64 ``[S]``; they sum to ``count``.

    Raises:
        ConfigError: The sampler returns positions outside the schedule, or another number of them.
    """
    values = timesteps.detach().to("cpu", torch.float64)
    counts = torch.zeros(len(values), dtype=torch.int64)
    while missing := count - int(counts.sum()):
        # Full steps are off the schedule from here on, so every round places at least one sample.
        open_steps = (counts < capacity).nonzero().flatten()
        drawn = sampler.draw(values[open_steps], missing, horizon, generator)
        if drawn.shape != (missing,) or bool((drawn < 0).any()) or bool((drawn >= len(open_steps)).any()):
            msg = f"{type(sampler).__name__}.draw must return {missing} positions from 0 to {len(open_steps) - 1}"
            raise ConfigError(msg)
        drawn_counts = torch.bincount(open_steps[drawn], minlength=len(values))
        counts = torch.minimum(counts + drawn_counts, capacity)
    return counts
