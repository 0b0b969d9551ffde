"""Sample trajectories once with the float model, and keep what the denoiser saw on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.data.model_inputs import ModelInputs, sample_shape
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.data.timestep_samplers import TimestepSampler, place_samples, resolve_sampler
from tfmq_fx.data.trajectory_batch import TrajectoryBatch, started_copy
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.surroundings import evaluation_mode, in_plain_surroundings

__all__ = ["sample_trajectories"]

log = logging.getLogger(__name__)

#: Samples kept per step, unless there are fewer trajectories.
SAMPLES_PER_STEP = 8


@in_plain_surroundings
@torch.no_grad()
def sample_trajectories(
    model: nn.Module,
    scheduler: Scheduler,
    *,
    steps: int = 50,
    samples: int = 64,
    batch_size: int = 16,
    keep: int | None = None,
    sampler: str | TimestepSampler = "uniform",
    shape: Sequence[int] | None = None,
    extra: Mapping[str, Any] | None = None,
    timestep: str = "timestep",
    timestep_as_batch: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run the float model's own sampler and keep inputs of the denoiser for :func:`tfmq_fx.calibrate`.

    Every trajectory is walked exactly once, from noise to image: ``samples * S`` evaluations for ``S``
    steps, where restarting from noise for each timestep would cost ``S`` times as many. For each step a
    few trajectories are chosen, every trajectory about equally often.

    Args:
        model: The float denoiser, called by name with its sample (its first argument), the timestep and
            ``extra``. It runs in evaluation mode, which is restored.
        scheduler: A diffusers scheduler. A copy is used; stochastic ones draw from a seeded generator.
        steps: Sampling steps, as for ``scheduler.set_timesteps``.
        samples: Trajectories.
        batch_size: Trajectories that are sampled together, and the largest returned batch.
        keep: Samples of calibration data kept per step on average, so that ``keep * S`` are kept in total. By
            default 8, or as many as there are trajectories.
        sampler: How the samples are spread over the steps: ``"uniform"``; ``"ndtc"`` (PTQ4DM's normal
            distribution, :class:`tfmq_fx.NormalTimesteps`); or any :class:`tfmq_fx.TimestepSampler`.
        shape: Shape of one sample, ``[C, ...]``; by default from the model's diffusers configuration.
        extra: Further inputs by name: tensors with one item per trajectory or a single item, or anything
            else, which is passed as it is.
        timestep: Name of the model's timestep argument.
        timestep_as_batch: Whether the timestep is passed as ``[N]``; otherwise as a 0-dim tensor.
        seed: Seed of the noise, and of the choice of samples.
        progress: Whether to draw a progress bar, where stderr is a terminal; ``TFMQ_FX_PROGRESS=0`` turns all off.

    Returns:
        Batches of the model's inputs by name, exactly as the denoiser saw them (after
        ``scheduler.scale_model_input``), on the model's device. Each holds samples of one step; the steps
        come in random order, so that an observer that forgets does not favour the last ones.

    Raises:
        ConfigError: A number, the sampler, the scheduler or an extra input is not usable.
        CalibrationError: The model cannot be called so, or a trajectory becomes NaN or infinite.

    Source: Q-Diffusion (ICCV 2023), calibration data from the float model's own sampling; PTQ4DM
    (CVPR 2023) for ``"ndtc"``.
    """
    _check_positive(steps=steps, samples=samples, batch_size=batch_size)
    if keep is None:
        keep = min(SAMPLES_PER_STEP, samples)
    _check_positive(keep=keep)
    if keep > samples:
        msg = f"keep={keep} rows per step cannot come from samples={samples} trajectories; keep fewer or sample more"
        raise ConfigError(msg)
    strategy = resolve_sampler(sampler)
    timesteps = started_copy(scheduler, steps).timesteps
    selection = _select_samples(strategy, scheduler, timesteps, samples, keep, seed)
    inputs = ModelInputs.of(model, timestep, extra or {}, samples, timestep_as_batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, *_shape(model, shape)), generator=generator)

    recorded: list[list[tuple[Tensor, Tensor]]] = [[] for _ in timesteps]
    starts = range(0, samples, batch_size)
    log.info("sampling %d trajectories of %d steps with %s", samples, len(timesteps), type(scheduler).__name__)
    bar = Progress(console=progress_console(), disable=not draws_progress(progress), transient=True)
    with evaluation_mode(model), bar:
        task = bar.add_task("sampling trajectories", total=len(starts) * len(timesteps))
        for start in starts:
            trajectories = torch.arange(start, min(start + batch_size, samples))
            started, start_noise = started_copy(scheduler, steps), noise[trajectories].to(device)
            batch = TrajectoryBatch(model, started, inputs, trajectories, start_noise, generator)
            for step, now in enumerate(batch.scheduler.timesteps):
                model_input = batch.advance(now.to(device)).model_input
                selected = selection[step, trajectories].nonzero().flatten()
                if len(selected):
                    recorded[step].append((trajectories[selected], model_input[selected.to(device)]))
                bar.advance(task)
    batches = [
        inputs.bind(x, timesteps[step].to(device), trajectories)
        for step, pieces in enumerate(recorded)
        for trajectories, x in _rebatch(pieces, batch_size)
    ]
    order = torch.randperm(len(batches), generator=generator)
    return [batches[i] for i in order.tolist()]


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            msg = f"{name}={value!r} must be a whole number of at least 1"
            raise ConfigError(msg)


def _select_samples(
    strategy: TimestepSampler, scheduler: Scheduler, timesteps: Tensor, samples: int, keep: int, seed: int
) -> Tensor:
    """Which trajectories are kept at which step: bool ``[S, samples]``."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(timesteps)
    horizon = int(scheduler.config.get("num_train_timesteps", 1000))
    capacity = torch.full((steps,), samples)
    counts = place_samples(strategy, timesteps, keep * steps, capacity, horizon, generator)
    # Dealt like cards from one shuffled deck, round and round, so no trajectory is used much more than others.
    deck, dealt = torch.randperm(samples, generator=generator), 0
    selection = torch.zeros(steps, samples, dtype=torch.bool)
    for step, count in enumerate(counts.tolist()):
        selection[step, deck[(dealt + torch.arange(count)) % samples]] = True
        dealt += count
    return selection


def _shape(model: nn.Module, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        return tuple(int(size) for size in shape)
    return sample_shape(getattr(model, "config", None), type(model).__name__)


def _rebatch(pieces: list[tuple[Tensor, Tensor]], batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Join one step's samples and cut them into batches."""
    if not pieces:
        return []
    trajectories, x = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return list(zip(torch.split(trajectories, batch_size), torch.split(x, batch_size), strict=True))
