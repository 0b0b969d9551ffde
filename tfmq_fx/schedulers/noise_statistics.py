r"""What quantization adds to a denoiser's output, timestep by timestep.

With the float output :math:`\epsilon` and the quantized one :math:`\hat\epsilon`, PTQD (NeurIPS 2023, section 4.1)
takes the quantization noise apart into what follows the output and a rest that does not:

.. math:: \hat\epsilon_t - \epsilon_t = k_t \epsilon_t + R_t, \qquad R_t \sim (\mu_t, \sigma_{q,t}^2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.data.prediction import predicted
from tfmq_fx.data.protocols import RecordedBatch, Scheduler
from tfmq_fx.errors import CalibrationError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.schedulers.json_tables import TableField, read_json, write_json
from tfmq_fx.schedulers.timestep_rows import grouped_by_timestep, known_row, schedule_of

__all__ = ["NoiseStatistics", "collect_noise_statistics"]

FIELDS: Mapping[str, type | TableField] = {
    "scheduler": str, "prediction": str, "steps": int, "eta": float,
    "timesteps": TableField(("K",)), "slope": TableField(("K",)),
    "bias": TableField(("K", "C")), "variance": TableField(("K",)),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class NoiseStatistics:
    """Statistics of the quantization noise, for one sampler.

    Attributes:
        scheduler: Class name of the diffusers scheduler.
        prediction: What the model predicts, the scheduler's ``prediction_type``; ``""`` where it has none.
        steps: Sampling steps.
        eta: How stochastic the sampler is: 0 for a deterministic one, DDIM's eta, 1 for DDPM.
        timesteps: The timesteps of the schedule, float64 ``[K]``.
        slope: ``k_t``, the part of the noise that follows the output, not negative, float64 ``[K]``.
        bias: ``mu_t``, mean of the rest per channel, float64 ``[K, C]``.
        variance: Variance of the rest, float64 ``[K]``.
    """

    scheduler: str
    prediction: str
    steps: int
    eta: float
    timesteps: Tensor
    slope: Tensor
    bias: Tensor
    variance: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in FIELDS}
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}

    def save(self, file: str | Path) -> Path:
        """Write the statistics as JSON."""
        return write_json(file, self.to_dict())

    @classmethod
    def load(cls, file: str | Path) -> NoiseStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file does not hold such statistics.
        """
        return cls(**read_json(file, FIELDS, "noise statistics"))


class _Moments:
    """Sums of the first and second powers of output and noise, per channel, float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = torch.zeros(5, channels, dtype=torch.float64)

    def add(self, output: Tensor, noise: Tensor) -> None:
        """Add items ``[n, C, ...]`` of one timestep."""
        e, d = (x.double().movedim(1, 0).flatten(1) for x in (output, noise))
        self.count += e.shape[1]
        self.sums += torch.stack([x.sum(1) for x in (e, d, e * e, e * d, d * d)]).cpu()

    def fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, bias per channel and variance."""
        mean_e, mean_d, ee, ed, dd = self.sums / self.count
        # Centred per channel: what is constant in a channel is bias, not correlation.
        ee, ed, dd = ee - mean_e**2, ed - mean_e * mean_d, dd - mean_d**2
        slope = (ed.sum() / ee.sum()).clamp_min(0.0) if float(ee.sum()) > 0 else torch.zeros((), dtype=torch.float64)
        variance = (dd - 2 * slope * ed + slope**2 * ee).mean().clamp_min(0.0)
        return slope, mean_d - slope * mean_e, variance


@in_plain_surroundings
@torch.no_grad()
def collect_noise_statistics(
    model: Callable[..., Any],
    denoiser: Callable[..., Any],
    scheduler: Scheduler,
    batches: Iterable[RecordedBatch],
    *,
    steps: int,
    eta: float | None = None,
    timestep: str = "timestep",
) -> NoiseStatistics:
    """Measure the quantization noise on recorded calibration inputs: both denoisers, one pass.

    Args:
        model: The float denoiser, called with a batch's inputs by name.
        denoiser: The quantized one (:func:`tfmq_fx.lower`), called alike.
        scheduler: The scheduler that the calibration trajectories were sampled with; it is not changed.
        batches: What :func:`tfmq_fx.sample_trajectories` returned: inputs by name, the sample first. Items at other
            timesteps than the schedule's are left out.
        steps: Sampling steps.
        eta: How stochastic the sampler is that will be corrected. By default 1 for DDPM and 0 for the others.
        timestep: Name of the timestep input.

    Raises:
        CalibrationError: A batch is not by name, or a timestep of the schedule is in none of them.

    Source: PTQD (NeurIPS 2023), section 4.1; bias and variance are those of the residual, as in the paper (its code
    takes the bias of the whole noise). With classifier-free guidance, measure and correct the guided output: wrap both
    denoisers accordingly.
    """
    values = schedule_of(scheduler, steps)
    moments: dict[int, _Moments] = {}
    for batch, sample, groups in grouped_by_timestep(batches, timestep):
        channels = sample.shape[1]
        output, quantized = (predicted(run(**batch), channels) for run in (model, denoiser))
        for value, mask in groups:
            row = known_row(values, value)
            if row is not None:
                items = mask.to(output.device)
                moments.setdefault(row, _Moments(output.shape[1])).add(output[items], (quantized - output)[items])
    if len(moments) < len(values):
        first = next(float(values[row]) for row in range(len(values)) if row not in moments)
        msg = (
            f"{len(values) - len(moments)} of {len(values)} timesteps of the schedule are in no batch, the first is "
            f"{first:g}: record trajectories with the same scheduler and steps and the uniform sampler"
        )
        raise CalibrationError(msg)
    fits = [moments[row].fit() for row in range(len(values))]
    slope, bias, variance = (torch.stack(part) for part in zip(*fits, strict=True))
    name = type(scheduler).__name__
    return NoiseStatistics(
        scheduler=name,
        prediction=str(scheduler.config.get("prediction_type", "")),
        steps=steps,
        eta=(1.0 if name == "DDPMScheduler" else 0.0) if eta is None else float(eta),
        timesteps=values,
        slope=slope,
        bias=bias,
        variance=variance,
    )
