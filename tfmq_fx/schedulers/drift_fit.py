r"""Fit the correction of drift along the quantized trajectory.

Both samplers start from the same noise and, where they are stochastic, draw the same. Step by step, least squares over
all pixels of all trajectories give the coefficients of each channel,

.. math:: \min_{u, v, w} \sum \bigl(\hat x_{t-1} + u \hat x_t + v \hat\epsilon_t + w - x_{t-1}\bigr)^2

and the quantized sampler goes on from the corrected states, so that the next step's coefficients know what is left of
the drift.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.data.model_inputs import ModelInputs, sample_shape
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.data.trajectory_batch import Step, TrajectoryBatch, started_copy
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.surroundings import evaluation_mode, in_plain_surroundings
from tfmq_fx.schedulers.drift import DriftCorrection, corrected, sampling_config, terms
from tfmq_fx.schedulers.drift_scheduler import DDIM, check_eta, check_unwrapped

__all__ = ["collect_drift_correction"]

#: Of the trajectories, the share that nothing is fitted on.
HELD_BACK = 0.25
#: Of each term's own sum of squares, what is added to it: in the first steps state and prediction are nearly the same.
RIDGE = 1e-6
TINY = torch.finfo(torch.float64).tiny


@in_plain_surroundings
@torch.no_grad()
def collect_drift_correction(
    model: nn.Module,
    denoiser: Callable[..., Any],
    scheduler: Scheduler,
    *,
    steps: int = 50,
    samples: int = 32,
    batch_size: int = 16,
    eta: float = 0.0,
    shape: Sequence[int] | None = None,
    extra: Mapping[str, Any] | None = None,
    timestep: str = "timestep",
    timestep_as_batch: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> DriftCorrection:
    """Fit the correction of a quantized sampler on trajectories that it and the float sampler walk side by side.

    Every step costs an evaluation of both denoisers for each trajectory, and another one of the quantized denoiser for
    the quarter of them that is held back to say what the correction is worth.

    Args:
        model: The float denoiser, called by name with its sample (its first argument), the timestep and ``extra``.
        denoiser: The quantized one (:func:`tfmq_fx.lower`), called alike.
        scheduler: The diffusers scheduler that will be corrected; a copy is used.
        steps: Sampling steps.
        samples: Trajectories, at least 2.
        batch_size: Trajectories of one call.
        eta: How stochastic DDIM is; no other scheduler has it.
        shape: Shape of one sample, ``[C, ...]``; by default from the model's diffusers configuration.
        extra: Further inputs by name: tensors with one item per trajectory or a single item, or anything else, which
            is passed as it is.
        timestep: Name of the timestep input.
        timestep_as_batch: Whether the timestep is passed as ``[N]``; otherwise as a 0-dim tensor.
        seed: Seed of the noise; take another one than that of the calibration data.
        progress: Whether to draw a progress bar, where stderr is a terminal; ``TFMQ_FX_PROGRESS=0`` turns all off.

    Returns:
        The correction; its ``gain`` is what it is worth on the trajectories that were held back. Where that is nothing
        or less, a warning says so.

    Raises:
        ConfigError: A number, the scheduler or an extra input is not usable.
        CalibrationError: A denoiser cannot be called so, or a trajectory becomes NaN or infinite.

    Source: arXiv 2508.12094, as said at :class:`tfmq_fx.schedulers.DriftCorrectedScheduler`. Being least squares, it
    draws states that are hard to foretell towards the mean.
    """
    for name, number, least in (("steps", steps, 1), ("samples", samples, 2), ("batch_size", batch_size, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            msg = f"{name}={number!r} must be a whole number of at least {least}"
            raise ConfigError(msg)
    check_unwrapped(scheduler)
    check_eta(scheduler, eta)
    options = {"eta": eta} if type(scheduler).__name__ == DDIM else {}
    inputs = ModelInputs.of(model, timestep, extra or {}, samples, timestep_as_batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sizes = tuple(shape) if shape is not None else sample_shape(getattr(model, "config", None), type(model).__name__)
    noise = torch.randn((samples, *sizes), generator=torch.Generator().manual_seed(seed))
    schedule = started_copy(scheduler, steps).timesteps

    def walks(denoise: Callable[..., Any], first: int, end: int) -> list[TrajectoryBatch]:
        """The trajectories from ``first`` to ``end`` in batches; the same ones draw the same, whoever denoises."""
        return [
            TrajectoryBatch(
                denoise, started_copy(scheduler, steps), inputs, part, noise[part].to(device),
                torch.Generator().manual_seed(seed + 1 + int(part[0])), **options,
            )
            for part in torch.split(torch.arange(first, end), batch_size)
        ]  # fmt: skip

    fitted = samples - max(1, round(HELD_BACK * samples))
    ranges = ((0, fitted), (fitted, samples))
    float_walks, quantized = ([walks(denoise, *ends) for ends in ranges] for denoise in (model, denoiser))
    plain = walks(denoiser, *ranges[1])
    coefficients = []
    bar = Progress(console=progress_console(), disable=not draws_progress(progress), transient=True)
    with evaluation_mode(model), bar:
        for now in bar.track(schedule.to(device), description="fitting the drift"):
            targets = [[walk.advance(now).following for walk in group] for group in float_walks]
            gone = [[walk.advance(now) for walk in group] for group in quantized]
            for walk in plain:
                walk.advance(now)
            coefficients.append(_fit(gone[0], targets[0]))
            for walk, step in zip(_flat(quantized), _flat(gone), strict=True):
                walk.state = corrected(coefficients[-1], step.state, step.prediction, step.following)
    gain = _gain(float_walks[1], plain, quantized[1])
    if gain <= 0:
        held_back = samples - fitted
        msg = f"the drift correction is worth {gain:+.2f} dB on {held_back} held-back trajectories: sample without it"
        warnings.warn(msg, stacklevel=4)  # behind two decorators
    return DriftCorrection(
        scheduler=type(scheduler).__name__,
        config=sampling_config(scheduler),
        eta=float(eta),
        timesteps=schedule.double().cpu(),
        coefficients=torch.stack(coefficients),
        gain=gain,
    )


def _flat(groups: list[list[Any]]) -> list[Any]:
    return [item for group in groups for item in group]


def _fit(gone: Sequence[Step], targets: Sequence[Tensor]) -> Tensor:
    """Coefficients of one step, float64 ``[C, 3]``, by the normal equations of each channel."""
    gram, moment = torch.zeros(()), torch.zeros(())
    for step, target in zip(gone, targets, strict=True):
        # [C, pixels, 3]
        rows = torch.stack([term.double().movedim(1, 0).flatten(1) for term in terms(step.state, step.prediction)], -1)
        missing = (target.double() - step.following.double()).movedim(1, 0).flatten(1)
        gram = gram + (rows.mT @ rows).cpu()
        moment = moment + (rows.mT @ missing[..., None]).cpu()
    # With the smallest float a term that is zero everywhere gets a coefficient of zero.
    damped = gram + torch.diag_embed(RIDGE * gram.diagonal(dim1=1, dim2=2) + TINY)
    solution: Tensor = torch.linalg.solve(damped, moment)
    return solution[..., 0]


def _gain(float_walks: list[TrajectoryBatch], plain: list[TrajectoryBatch], quantized: list[TrajectoryBatch]) -> float:
    """By how many decibels the squared distance of the last states from the float ones fell, on the mean."""

    def distance(walks: list[TrajectoryBatch]) -> Tensor:
        pairs = zip(walks, float_walks, strict=True)
        squares = [(walk.state.double() - other.state.double()).square().flatten(1).sum(1) for walk, other in pairs]
        return torch.cat(squares).clamp_min(TINY)

    return float((10 * torch.log10(distance(plain) / distance(quantized))).mean())
