"""The sampler's state at low width: what PTQ4DM quantizes beside the network."""

from __future__ import annotations

from typing import Any

import torch

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import ConfigError
from tfmq_fx.observers.ranges import fake_quantize
from tfmq_fx.schedulers.sample_ranges import SampleRanges
from tfmq_fx.schedulers.timestep_rows import check_schedule, find_row
from tfmq_fx.schedulers.wrapper import SchedulerWrapper, with_sample

__all__ = ["QuantizedSampleScheduler"]

SUPPORTED = ("DDPMScheduler", "DDIMScheduler")
WHAT = "the sample ranges"


class QuantizedSampleScheduler(SchedulerWrapper):
    """Rounds every ``x_{t-1}`` that goes back into the denoiser to integers of the ranges' width.

    The last step's result is the image; it goes nowhere and stays as it is.

    Args:
        scheduler: A ``DDPMScheduler`` or ``DDIMScheduler``, or a :class:`PTQDScheduler` around one; it is not copied.
        ranges: From :func:`tfmq_fx.schedulers.collect_sample_ranges`, for this scheduler and its steps.

    Raises:
        ConfigError: The scheduler is another, whose state is scaled or spread over several steps, or the ranges are
            another's.
        TimestepError: From ``set_timesteps`` and ``step``, for a timestep that the ranges do not have.

    Source: PTQ4DM (Shang et al., CVPR 2023), section 3, which quantizes the result of every step; its code does not.
    """

    def __init__(self, scheduler: Scheduler, ranges: SampleRanges) -> None:
        super().__init__(scheduler)
        name = type(self.innermost()).__name__
        if name not in SUPPORTED:
            msg = f"the state of a {name} is not quantized: use one of {', '.join(SUPPORTED)}"
            raise ConfigError(msg)
        if name != ranges.scheduler:
            msg = f"the sample ranges are of {ranges.scheduler}, not of {name}: collect them for this scheduler"
            raise ConfigError(msg)
        self.ranges = ranges

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the inner scheduler's.

        Raises:
            TimestepError: A timestep has no range.
        """
        self.scheduler.set_timesteps(*args, **kwargs)
        check_schedule(self.timesteps, self.ranges.timesteps, WHAT)

    def take_step(self, arguments: dict[str, Any]) -> Any:
        """Step, and round the result with the range of the timestep that it belongs to.

        Raises:
            TimestepError: The timestep is not of the schedule.
        """
        schedule = self.timesteps.double().cpu()
        position = find_row(schedule, arguments["timestep"], "the schedule")
        output = self.scheduler.step(**arguments)
        if position + 1 == len(schedule):
            return output
        row = find_row(self.ranges.timesteps, schedule[position + 1], WHAT)
        x = output[0] if isinstance(output, tuple) else output.prev_sample
        # In float32: a small scale would be 0 in half precision.
        scale, zero = (table[row].to(x.device, torch.float32) for table in (self.ranges.scale, self.ranges.zero_point))
        rounded = fake_quantize(x.to(torch.float32), scale, zero, 0, 2**self.ranges.bits - 1)
        return with_sample(output, rounded.to(x.dtype))
