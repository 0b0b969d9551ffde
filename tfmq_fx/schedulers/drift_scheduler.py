"""The correction of drift, around a diffusers scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import ConfigError, TimestepError
from tfmq_fx.passes.support.timestep_values import distinct_timesteps
from tfmq_fx.schedulers.drift import DriftCorrection, corrected, sampling_config
from tfmq_fx.schedulers.timestep_rows import find_row
from tfmq_fx.schedulers.wrapper import SchedulerWrapper, with_sample

__all__ = ["DriftCorrectedScheduler", "check_eta", "check_unwrapped"]

DDIM = "DDIMScheduler"
WHAT = "the drift correction"
COLLECT = "collect it for the scheduler that you sample with"


class DriftCorrectedScheduler(SchedulerWrapper):
    """Moves each state of a quantized sampler to where the float sampler's was, on the mean of calibration.

    It goes around any diffusers scheduler. Three numbers a channel and step are multiplied and added, which takes no
    time beside the denoiser.

    Args:
        scheduler: A diffusers scheduler; it is not copied.
        correction: From :func:`tfmq_fx.schedulers.collect_drift_correction`, for this scheduler, its steps and eta.

    Raises:
        ConfigError: The scheduler is a wrapper, or the correction is another's.
        TimestepError: From ``set_timesteps`` and ``step``: the schedule is another.

    Source: the error that has accumulated along the quantized trajectory is compensated, timestep by timestep, from
    calibration, as in arXiv 2508.12094, of which the abstract was read. The form of the correction and its fit are
    ours.
    """

    def __init__(self, scheduler: Scheduler, correction: DriftCorrection) -> None:
        super().__init__(scheduler)
        check_unwrapped(scheduler)
        name, own = type(scheduler).__name__, sampling_config(scheduler)
        if name != correction.scheduler:
            msg = f"{WHAT} is of {correction.scheduler}, not of {name}: {COLLECT}"
            raise ConfigError(msg)
        other = sorted(key for key in {*own, *correction.config} if own.get(key) != correction.config.get(key))
        if other:
            was, now = (config.get(other[0]) for config in (correction.config, own))
            msg = f"{WHAT} is of {name} with {other[0]}={was!r}, not {now!r}: {COLLECT}"
            raise ConfigError(msg)
        self.correction = correction
        self._distinct = distinct_timesteps(correction.timesteps)
        self._last_row = -1

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the inner scheduler's.

        Raises:
            TimestepError: The correction is of another schedule.
        """
        self.scheduler.set_timesteps(*args, **kwargs)
        self._check_schedule()
        self._last_row = -1

    def take_step(self, arguments: dict[str, Any]) -> Any:
        """Step, and correct the result.

        Raises:
            TimestepError: The correction is of another schedule.
            ConfigError: Another eta than that of the correction is asked for, or the state has other channels.
        """
        self._check_schedule()
        eta = self.correction.eta
        if type(self.scheduler).__name__ == DDIM and arguments.setdefault("eta", eta) != eta:
            msg = f"step was called with eta={arguments['eta']:g}, but {WHAT} is for eta={eta:g}: collect it for it"
            raise ConfigError(msg)
        row, state = self._row(arguments["timestep"]), arguments["sample"]
        coefficients = self.correction.coefficients[row]
        if state.ndim < 2 or state.shape[1] != len(coefficients):
            msg = f"the state has shape {list(state.shape)}, but {WHAT} is of {len(coefficients)} channels"
            raise ConfigError(msg)
        result = self.scheduler.step(**arguments)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        self._last_row = row
        return with_sample(result, corrected(coefficients, state, arguments["model_output"], following))

    def _check_schedule(self) -> None:
        own, known = self.scheduler.timesteps, self.correction.timesteps
        if len(own) != len(known):
            msg = f"{WHAT} is of {len(known)} steps and the schedule has {len(own)}: collect it for these steps"
            raise TimestepError(msg)
        for timestep in own:
            find_row(self._distinct, timestep, WHAT)

    def _row(self, timestep: float | Tensor) -> int:
        """The place of a timestep; of one that the schedule visits again, as solvers of higher order do, the next."""
        value = self._distinct[find_row(self._distinct, timestep, WHAT)]
        places: list[int] = (self.correction.timesteps == value).nonzero().flatten().tolist()
        return next((place for place in places if place > self._last_row), places[0])


def check_unwrapped(scheduler: Scheduler) -> None:
    """Raise :class:`ConfigError` where a scheduler is wrapped already."""
    if isinstance(scheduler, SchedulerWrapper):
        name = type(scheduler).__name__
        msg = f"{WHAT} goes around the diffusers scheduler itself, not around a {name}: wrap them in that order"
        raise ConfigError(msg)


def check_eta(scheduler: Scheduler, eta: float) -> None:
    """Raise :class:`ConfigError` where an eta is negative, or given to a scheduler other than DDIM."""
    name = type(scheduler).__name__
    if not 0 <= eta < float("inf"):
        msg = f"eta={eta!r} must be a number from 0 on: 0 is deterministic, 1 as stochastic as DDPM"
        raise ConfigError(msg)
    if eta != 0 and name != DDIM:
        msg = f"eta={eta:g} is an option of DDIMScheduler, and this is a {name}: leave eta out"
        raise ConfigError(msg)
