"""The models of the quality benchmark: how each is loaded, calibrated and sampled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trained_models import EMOJI_MODEL, load_emoji_model, load_sigma_model

import tfmq_fx
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.data.prediction import predicted
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.diagnostics import Trajectory
from tfmq_fx.diagnostics.comparison import ddim_scheduler

__all__ = ["BUNDLED", "MODELS", "QualityModel", "models_there"]

BUNDLED = "bundled"
KEPT = 8


@dataclass(frozen=True)
class QualityModel:
    """A model, and how it is calibrated and sampled.

    Attributes:
        load: Makes the float model, in evaluation mode, and its scheduler.
        shape: Of one sample, ``(C, H, W)``.
        steps: Steps of calibration and of the compared images.
        calibrated: Calibration trajectories.
        batch_size: Of those, how many are walked together.
        ddim: Whether it is sampled by DDIM over its scheduler's noise schedule; else by that scheduler itself.
        classes: Classes that the samples take turns in; 0 where the model has none.
        every: All timesteps there are, ``[T]``; None where they are not counted.
    """

    load: Callable[[], tuple[nn.Module, Scheduler]]
    shape: tuple[int, int, int]
    steps: int = 50
    calibrated: int = 64
    batch_size: int = 16
    ddim: bool = True
    classes: int = 0
    every: Tensor | None = None

    def sampler(self, scheduler: Scheduler) -> Scheduler:
        """The sampler of the images, its timesteps set."""
        if self.ddim:
            return ddim_scheduler(scheduler, self.steps)
        made = copy.deepcopy(scheduler)
        made.set_timesteps(self.steps)
        return made

    def noise(self, samples: int, seed: int) -> Tensor:
        """What the compared images of a cell start from, ``[samples, C, H, W]``."""
        return torch.randn((samples, *self.shape), generator=torch.Generator().manual_seed(1000 + seed))

    def extra(self, count: int) -> dict[str, Tensor]:
        """Further inputs of the model for this many samples."""
        return {"class_labels": torch.arange(count) % self.classes} if self.classes else {}

    def calibration(self, model: nn.Module, sampler: Scheduler, seed: int) -> list[dict[str, Any]]:
        """Batches from the float model's own trajectories."""
        return tfmq_fx.sample_trajectories(
            model, sampler, steps=self.steps, samples=self.calibrated, batch_size=self.batch_size, keep=KEPT,
            shape=self.shape, extra=self.extra(self.calibrated), seed=seed,
        )  # fmt: skip

    @torch.no_grad()
    def trajectory(self, denoiser: Callable[..., Any], sampler: Scheduler, noise: Tensor) -> Trajectory:
        """Sample with any denoiser from standard normal noise, ``[N, C, H, W]``, and keep every state."""
        sampler = self.sampler(sampler)  # solvers keep a history
        x = noise * sampler.init_noise_sigma
        states = [x]
        for timestep in sampler.timesteps:
            output = predicted(denoiser(sampler.scale_model_input(x, timestep), timestep), x.shape[1])
            x = sampler.step(output, timestep, x).prev_sample
            states.append(x)
        return Trajectory(sampler.timesteps.double(), torch.stack(states))


EVERY = torch.arange(1000)
RGB = (3, 32, 32)
#: The sigma-conditioned model is sampled as ``sigma_error.py`` samples it: 40 steps of its own Euler solver, nine
#: classes in turn. Its timesteps are real numbers, and classes are added to its time embedding, so the time block is
#: that embedding alone.
MODELS: dict[str, QualityModel] = {
    BUNDLED: QualityModel(lambda: load_model(None), (1, 32, 32), every=EVERY),
    "emoji": QualityModel(load_emoji_model, RGB, every=EVERY),
    "sigma": QualityModel(load_sigma_model, RGB, steps=40, calibrated=18, batch_size=18, ddim=False, classes=9),
}


def models_there(names: Sequence[str]) -> list[str]:
    """Those of the models whose files are there; a line says which one is left out."""
    there = [name for name in names if name != "emoji" or EMOJI_MODEL.is_dir()]
    if len(there) < len(names):
        print(f"the emoji model is not at {EMOJI_MODEL}: it is left out")
    return there
