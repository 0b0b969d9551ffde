"""Ranges of the sampler's state, timestep by timestep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tfmq_fx.config.checks import check_choice
from tfmq_fx.data.protocols import RecordedBatch, Scheduler
from tfmq_fx.errors import CalibrationError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.observers import MSEObserver
from tfmq_fx.passes.support.timestep_values import ValueSearch
from tfmq_fx.schedulers.json_tables import TableField, read_json, write_json
from tfmq_fx.schedulers.timestep_rows import grouped_by_timestep, known_row, schedule_of

__all__ = ["SampleRanges", "collect_sample_ranges"]

BITS = tuple(range(2, 9))
FIELDS: Mapping[str, type | TableField] = {
    "scheduler": str, "steps": int, "bits": int,
    "timesteps": TableField(("K",)), "scale": TableField(("K",)), "zero_point": TableField(("K",), torch.int64),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SampleRanges:
    """Quantization parameters of the state ``x_t`` of a sampler.

    Attributes:
        scheduler: Class name of the diffusers scheduler.
        steps: Sampling steps.
        bits: Width, 2 to 8.
        timesteps: The timesteps of the schedule, float64 ``[K]``.
        scale: One scale for the whole of ``x_t``, float64 ``[K]``.
        zero_point: Its zero point, int64 ``[K]``.
    """

    scheduler: str
    steps: int
    bits: int
    timesteps: Tensor
    scale: Tensor
    zero_point: Tensor

    def save(self, file: str | Path) -> Path:
        """Write the ranges as JSON."""
        return write_json(file, {name: getattr(self, name) for name in FIELDS})

    @classmethod
    def load(cls, file: str | Path) -> SampleRanges:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file does not hold such ranges.
        """
        return cls(**read_json(file, FIELDS, "ranges of a sampler's state"))


@in_plain_surroundings
def collect_sample_ranges(
    scheduler: Scheduler,
    batches: Iterable[RecordedBatch],
    *,
    steps: int,
    bits: int = 8,
    timestep: str = "timestep",
) -> SampleRanges:
    """Choose a symmetric range of ``x_t`` per timestep by the L2.4 search, from recorded calibration inputs.

    Args:
        scheduler: The scheduler that the calibration trajectories were sampled with; it is not changed.
        batches: What :func:`tfmq_fx.sample_trajectories` returned: inputs by name, the sample first.
        steps: Sampling steps.
        bits: Width, 2 to 8.
        timestep: Name of the timestep input.

    Returns:
        Ranges for every timestep of the schedule. One that no batch holds takes the nearest timestep's, since NDTC
        draws some steps seldom; neighbouring states hardly differ in range.

    Raises:
        ConfigError: ``bits`` is not supported.
        CalibrationError: A batch is not by name, or no batch is of this schedule.
    """
    check_choice("bits", bits, BITS)
    values = schedule_of(scheduler, steps)
    observers: dict[int, MSEObserver] = {}
    for _, sample, groups in grouped_by_timestep(batches, timestep):
        for value, mask in groups:
            row = known_row(values, value)
            if row is not None:
                made = MSEObserver(
                    dtype=torch.uint8,
                    quant_min=0,
                    quant_max=2**bits - 1,
                    qscheme=torch.per_tensor_symmetric,
                    subject=f"the sampler's state at timestep {float(value):g}",
                )
                observers.setdefault(row, made)(sample.cpu()[mask])
    if not observers:
        msg = "no batch is of a timestep of this schedule: record trajectories with the same scheduler and steps"
        raise CalibrationError(msg)
    chosen = {row: observer.calculate_qparams() for row, observer in observers.items()}
    observed_rows = torch.tensor(list(chosen))
    rows = observed_rows[ValueSearch(values[observed_rows]).nearest(values)[0]].tolist()
    return SampleRanges(
        scheduler=type(scheduler).__name__,
        steps=steps,
        bits=bits,
        timesteps=values,
        scale=torch.cat([chosen[row][0] for row in rows]).double(),
        zero_point=torch.cat([chosen[row][1] for row in rows]),
    )
