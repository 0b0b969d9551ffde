"""Tables by timestep: rows by value, batches taken apart."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from tfmq_fx.data.protocols import RecordedBatch, Scheduler
from tfmq_fx.errors import CalibrationError, TimestepError
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps

__all__ = ["check_schedule", "find_row", "grouped_by_timestep", "known_row", "schedule_of"]


def schedule_of(scheduler: Scheduler, steps: int) -> Tensor:
    """The distinct timesteps that ``scheduler`` visits in this many steps, float64 ``[K]``; it is not changed."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return distinct_timesteps(scheduler.timesteps)


def known_row(values: Tensor, timestep: float | Tensor) -> int | None:
    """The row of ``values`` that holds ``timestep``, a number or a tensor with one element, or None."""
    value = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, dtype=torch.float64)
    row, matched = ValueSearch(values).find(value.detach().reshape(()).cpu())
    return int(row) if bool(matched) else None


def find_row(values: Tensor, timestep: float | Tensor, what: str) -> int:
    """The row of a timestep, by value.

    Args:
        values: The table's timesteps, float64 ``[K]``.
        timestep: A number or a tensor with one element.
        what: What the table holds, for the message.

    Raises:
        TimestepError: The timestep has no row.
    """
    row = known_row(values, timestep)
    if row is None:
        msg = (
            f"timestep {float(timestep):g} is not in {what} ({len(values)} timesteps from {float(values.max()):g} to "
            f"{float(values.min()):g}): collect them for the schedule that you sample with"
        )
        raise TimestepError(msg)
    return row


def check_schedule(timesteps: Tensor, values: Tensor, what: str) -> None:
    """Raise unless every timestep of a schedule has a row.

    Args:
        timesteps: The schedule, ``[S]``.
        values: The table's timesteps, float64 ``[K]``.
        what: What the table holds, for the message.

    Raises:
        TimestepError: Names the first timestep without a row.
    """
    for timestep in timesteps:
        find_row(values, timestep, what)


def grouped_by_timestep(
    batches: Iterable[RecordedBatch], timestep: str
) -> Iterator[tuple[RecordedBatch, Tensor, list[tuple[Tensor, Tensor]]]]:
    """Go through recorded batches and say which items belong to which timestep.

    Args:
        batches: Inputs of a denoiser by name, the sample first (:func:`tfmq_fx.sample_trajectories`).
        timestep: Name of the timestep input.

    Yields:
        The batch, its sample, and pairs of a timestep, as it was recorded, and a mask over the items, bool ``[N]``.

    Raises:
        CalibrationError: A batch is not by name, or has no timestep.
    """
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or timestep not in batch:
            msg = (
                f"batch {index} must give the denoiser's inputs by name with {timestep!r} among them, "
                "as sample_trajectories and record_trajectories return them"
            )
            raise CalibrationError(msg)
        sample = next(value for name, value in batch.items() if name != timestep and isinstance(value, Tensor))
        times = torch.as_tensor(batch[timestep]).detach().cpu().reshape(-1).expand(len(sample))
        yield batch, sample, [(value, times == value) for value in torch.unique(times)]
