"""Sample trajectories once with the float model, and keep what the denoiser saw on the way."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.data.prediction import predicted
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.data.sample_shape import sample_shape
from tfmq_fx.data.timestep_samplers import TimestepSampler, place_rows, resolve_sampler
from tfmq_fx.errors import CalibrationError, ConfigError
from tfmq_fx.frontend.surroundings import evaluation_mode

__all__ = ["sample_trajectories"]

log = logging.getLogger(__name__)

#: Rows kept per step, unless there are fewer trajectories.
KEPT_ROWS = 8


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
        batch_size: Trajectories that are sampled together, and the most rows of a returned batch.
        keep: Rows kept per step on average, so that ``keep * S`` are kept in total. By default 8, or as many as
            there are trajectories.
        sampler: How the rows are spread over the steps: ``"uniform"``; ``"ndtc"`` (PTQ4DM's normal
            distribution, :class:`tfmq_fx.NormalTimesteps`); or any :class:`tfmq_fx.TimestepSampler`.
        shape: Shape of one sample, ``[C, ...]``; by default from the model's diffusers configuration.
        extra: Further inputs by name: tensors with one row per trajectory or a single row, or anything
            else, which is passed as it is.
        timestep: Name of the model's timestep argument.
        timestep_as_batch: Whether the timestep is passed as ``[N]``; otherwise as a 0-dim tensor.
        seed: Seed of the noise, and of the choice of rows.
        progress: Whether to draw a progress bar, where stderr is a terminal; ``TFMQ_FX_PROGRESS=0`` turns all off.

    Returns:
        Batches of the model's inputs by name, exactly as the denoiser saw them (after
        ``scheduler.scale_model_input``), on the model's device. Each holds rows of one step; the steps
        come in random order, so that an observer that forgets does not favour the last ones.

    Raises:
        ConfigError: A number, the sampler, the scheduler or an extra input is not usable.
        CalibrationError: The model cannot be called so, or a trajectory becomes NaN or infinite.

    Source: Q-Diffusion (ICCV 2023), calibration data from the float model's own sampling; PTQ4DM
    (CVPR 2023) for ``"ndtc"``.
    """
    _check_positive(steps=steps, samples=samples, batch_size=batch_size)
    if keep is None:
        keep = min(KEPT_ROWS, samples)
    _check_positive(keep=keep)
    if keep > samples:
        msg = f"keep={keep} rows per step cannot come from samples={samples} trajectories; keep fewer or sample more"
        raise ConfigError(msg)
    strategy = resolve_sampler(sampler)
    timesteps = _started(scheduler, steps).timesteps
    wanted = _choose_rows(strategy, scheduler, timesteps, samples, keep, seed)
    inputs = _ModelInputs.of(model, timestep, extra or {}, samples, timestep_as_batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, *_shape(model, shape)), generator=generator)

    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in timesteps]
    starts = range(0, samples, batch_size)
    log.info("sampling %d trajectories of %d steps with %s", samples, len(timesteps), type(scheduler).__name__)
    bar = Progress(console=progress_console(), disable=not draws_progress(progress), transient=True)
    with evaluation_mode(model), bar:
        task = bar.add_task("sampling trajectories", total=len(starts) * len(timesteps))
        for start in starts:
            rows = torch.arange(start, min(start + batch_size, samples))
            walk = _Walk(model, _started(scheduler, steps), inputs, generator)
            x = noise[rows].to(device) * walk.scheduler.init_noise_sigma
            for step, now in enumerate(walk.scheduler.timesteps):
                seen, x = walk.advance(x, now.to(device), rows)
                here = wanted[step, rows].nonzero().flatten()
                if len(here):
                    kept[step].append((rows[here], seen[here.to(device)]))
                bar.advance(task)
    batches = [
        inputs.bind(x, timesteps[step].to(device), rows)
        for step, pieces in enumerate(kept)
        for rows, x in _rebatch(pieces, batch_size)
    ]
    order = torch.randperm(len(batches), generator=generator)
    return [batches[i] for i in order.tolist()]


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            msg = f"{name}={value!r} must be a whole number of at least 1"
            raise ConfigError(msg)


def _started(scheduler: Scheduler, steps: int) -> Scheduler:
    """A copy of the scheduler that stands at the start; solvers keep a history, so each walk needs its own."""
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        msg = f"a {type(scheduler).__name__} is no scheduler: it has no set_timesteps and step"
        raise ConfigError(msg)
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError) as error:
        msg = f"{type(scheduler).__name__} cannot make {steps} steps: {_first_line(error)}"
        raise ConfigError(msg) from error
    return scheduler


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _choose_rows(
    strategy: TimestepSampler, scheduler: Scheduler, timesteps: Tensor, samples: int, keep: int, seed: int
) -> Tensor:
    """Which trajectories are kept at which step: bool ``[S, samples]``."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(timesteps)
    horizon = int(scheduler.config.get("num_train_timesteps", 1000))
    capacity = torch.full((steps,), samples)
    counts = place_rows(strategy, timesteps, keep * steps, capacity, horizon, generator)
    # Dealt like cards from one shuffled deck, round and round, so no trajectory is used much more than others.
    deck, wanted, dealt = torch.randperm(samples, generator=generator), torch.zeros(steps, samples, dtype=torch.bool), 0
    for step, count in enumerate(counts.tolist()):
        wanted[step, deck[(dealt + torch.arange(count)) % samples]] = True
        dealt += count
    return wanted


def _shape(model: nn.Module, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        return tuple(int(size) for size in shape)
    return sample_shape(getattr(model, "config", None), type(model).__name__)


@dataclass(frozen=True)
class _ModelInputs:
    """How the denoiser is called: the names of its sample and timestep, and the rows of its further inputs."""

    sample: str
    timestep: str
    extra: Mapping[str, Any]
    samples: int
    timestep_as_batch: bool

    @classmethod
    def of(
        cls, model: nn.Module, timestep: str, extra: Mapping[str, Any], samples: int, timestep_as_batch: bool
    ) -> _ModelInputs:
        """Check the model's signature and the extra inputs.

        Raises:
            ConfigError: The model takes no timestep, or an extra tensor has another number of rows.
        """
        names = list(inspect.signature(model.forward).parameters)
        if timestep not in names[1:]:
            msg = (
                f"{type(model).__name__}.forward takes ({', '.join(names)}), not a sample and a {timestep}; "
                "name the timestep that it takes with timestep="
            )
            raise ConfigError(msg)
        for name, value in extra.items():
            if isinstance(value, Tensor) and (value.ndim == 0 or len(value) not in (1, samples)):
                msg = f"extra input {name!r} has shape {list(value.shape)}: its axis 0 must be 1 or samples={samples}"
                raise ConfigError(msg)
        return cls(names[0], timestep, {k: v for k, v in extra.items() if v is not None}, samples, timestep_as_batch)

    def bind(self, x: Tensor, timestep: Tensor, rows: Tensor) -> dict[str, Any]:
        """The inputs by name for these rows (trajectories) at one timestep."""

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if len(value) == 1:
                return value.expand(len(rows), *value.shape[1:]).contiguous().to(x.device)
            return value[rows.to(value.device)].to(x.device)

        t = timestep.expand(len(rows)).clone() if self.timestep_as_batch else timestep.clone()
        return {self.sample: x, self.timestep: t, **{name: pick(value) for name, value in self.extra.items()}}


class _Walk:
    """One batch of trajectories on its way from noise to image."""

    def __init__(
        self, model: nn.Module, scheduler: Scheduler, inputs: _ModelInputs, generator: torch.Generator
    ) -> None:
        self.model, self.scheduler, self.inputs = model, scheduler, inputs
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self.options = {"generator": generator} if takes_generator else {}
        # Of diffusers' schedulers only those with this attribute read a learned variance.
        self.keep_variance = str(scheduler.config.get("variance_type", "")).startswith("learned")

    def advance(self, x: Tensor, timestep: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Go one step; return what the denoiser saw and the next ``x``.

        Raises:
            CalibrationError: The model cannot be called so, or the next ``x`` is NaN or infinite.
        """
        seen = self.scheduler.scale_model_input(x, timestep)
        arguments = self.inputs.bind(seen, timestep, rows)
        try:
            output = self.model(**arguments)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            given = ", ".join(arguments)
            msg = f"{type(self.model).__name__} cannot be called with ({given}): {_first_line(error)}"
            raise CalibrationError(msg) from error
        prediction = predicted(output, x.shape[1], keep_variance=self.keep_variance)
        following = self.scheduler.step(prediction, timestep, x, **self.options).prev_sample
        if not bool(torch.isfinite(following).all()):
            msg = (
                f"a trajectory became NaN or infinite at timestep {float(timestep):g}; "
                "check the model's weights and that the scheduler is the one it was trained with"
            )
            raise CalibrationError(msg)
        return seen, following


def _rebatch(pieces: list[tuple[Tensor, Tensor]], batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Join one step's kept rows and cut them into batches."""
    if not pieces:
        return []
    rows, x = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return list(zip(torch.split(rows, batch_size), torch.split(x, batch_size), strict=True))
