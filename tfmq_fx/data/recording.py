"""Record a whole diffusers pipeline: every real call of its denoiser becomes calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn

from tfmq_fx.data.recorded_calls import CallRecorder, check_call, select_samples
from tfmq_fx.data.timestep_samplers import TimestepSampler, resolve_sampler
from tfmq_fx.errors import CalibrationError, ConfigError
from tfmq_fx.frontend.surroundings import evaluation_mode

__all__ = ["record_trajectories"]

Pipeline = TypeVar("Pipeline")


@torch.no_grad()
def record_trajectories(
    pipeline: Pipeline,
    run: Callable[[Pipeline], object],
    *,
    component: str = "unet",
    timestep: str = "timestep",
    batched: Collection[str] | None = None,
    keep: int = 8,
    sampler: str | TimestepSampler = "uniform",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Run a pipeline as its users do and keep inputs of its denoiser for :func:`tfmq_fx.calibrate`.

    This is the way for models that need more than noise: prompts, guidance, control images. The
    denoiser is watched through a hook, which is gone afterwards.

    Args:
        pipeline: A diffusers pipeline, or anything that holds the denoiser as an attribute.
        run: Called once with the pipeline: ``lambda p: p("a cat", num_inference_steps=20)``; it may call
            it several times, for more prompts.
        component: Attribute that holds the denoiser: ``"unet"``, ``"transformer"`` …
        timestep: Name of the denoiser's timestep argument: ``"timestep"``, ``"timestep_ratio"`` …
        batched: The names of the arguments that have one entry per item of the batch; by default every tensor whose
            axis 0 is as long as the sample's.
        keep: Samples kept per distinct timestep on average; with fewer at hand, all are kept.
        sampler: As in :func:`tfmq_fx.sample_trajectories`; it needs a scheduler on the pipeline only
            for its number of training timesteps (1,000 without one).
        seed: Seed of the choice of samples. The pipeline's own noise is up to ``run``.

    Returns:
        Batches of the denoiser's inputs by argument name, one per call of which samples are kept, in random
        order. ``return_dict`` and optional inputs that were None are left out. Everything is recorded before the
        choice is made, so for a large model record a few prompts at a time.

    Raises:
        ConfigError: There is no such component, or ``keep`` or the sampler is not usable.
        CalibrationError: The denoiser was never called, without a timestep, or with NaN.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        msg = f"keep={keep!r} must be a whole number of at least 1"
        raise ConfigError(msg)
    strategy = resolve_sampler(sampler)
    batched = (batched,) if isinstance(batched, str) else batched
    denoiser = _component(pipeline, component)
    if not callable(run):
        msg = f"run={run!r} must be a function that calls the pipeline: lambda pipe: pipe('a cat')"
        raise ConfigError(msg)
    with evaluation_mode(denoiser), CallRecorder(denoiser, timestep) as recorder:
        run(pipeline)
    calls = recorder.calls
    if not calls:
        msg = f"run(pipeline) never called pipeline.{component}; call the pipeline in it, or name another component="
        raise CalibrationError(msg)
    for index, call in enumerate(calls):
        check_call(index, call, timestep)
    config = getattr(getattr(pipeline, "scheduler", None), "config", None)
    horizon = int(getattr(config, "num_train_timesteps", 1000))
    return select_samples(calls, timestep, batched, strategy, keep, horizon, torch.Generator().manual_seed(seed))


def _component(pipeline: object, name: str) -> nn.Module:
    module = getattr(pipeline, name, None)
    if not isinstance(module, nn.Module):
        components = getattr(pipeline, "components", None) or getattr(pipeline, "__dict__", {})
        names = [key for key, value in components.items() if isinstance(value, nn.Module)]
        msg = f"{type(pipeline).__name__} has no module {name!r}; it has {', '.join(map(repr, names)) or 'none'}"
        raise ConfigError(msg)
    return module
