"""Record a whole diffusers pipeline: every real call of its denoiser becomes calibration data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tfmq_fx._torch import pytree
from tfmq_fx.data.timestep_samplers import TimestepSampler, place_samples, resolve_sampler
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
        order. Inputs that were None and ``return_dict`` are left out. Everything is recorded before the
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
    calls = _record(denoiser, timestep, lambda: run(pipeline))
    if not calls:
        msg = f"run(pipeline) never called pipeline.{component}; call the pipeline in it, or name another component="
        raise CalibrationError(msg)
    for index, call in enumerate(calls):
        _check_call(index, call, timestep)
    config = getattr(getattr(pipeline, "scheduler", None), "config", None)
    horizon = int(getattr(config, "num_train_timesteps", 1000))
    return _select_samples(calls, timestep, batched, strategy, keep, horizon, torch.Generator().manual_seed(seed))


def _component(pipeline: object, name: str) -> nn.Module:
    module = getattr(pipeline, name, None)
    if not isinstance(module, nn.Module):
        components = getattr(pipeline, "components", None) or getattr(pipeline, "__dict__", {})
        names = [key for key, value in components.items() if isinstance(value, nn.Module)]
        msg = f"{type(pipeline).__name__} has no module {name!r}; it has {', '.join(map(repr, names)) or 'none'}"
        raise ConfigError(msg)
    return module


def _record(denoiser: nn.Module, timestep: str, run: Callable[[], object]) -> list[dict[str, Any]]:
    """The inputs of every call during ``run``, by argument name, detached and cloned."""
    signature = inspect.signature(denoiser.forward)
    calls: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        inputs = {name: value for name, value in bound.items() if value is not None and name != "return_dict"}
        if isinstance(inputs.get(timestep), (int, float)):  # a number could not be an input of a graph
            inputs[timestep] = torch.tensor(inputs[timestep])
        calls.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs))

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with evaluation_mode(denoiser):
            run()
    finally:
        handle.remove()
    return calls


def _check_call(index: int, call: dict[str, Any], timestep: str) -> None:
    if not isinstance(call.get(timestep), Tensor):
        msg = (
            f"call {index} of the denoiser had no {timestep}; its inputs were {', '.join(call)}: "
            "name its timestep with timestep="
        )
        raise CalibrationError(msg)
    for name, value in call.items():
        for leaf in pytree.tree_leaves(value):
            # Minus infinity is normal in an additive mask; calibration, which knows the masks, refuses it elsewhere.
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool((leaf < torch.inf).all()):
                msg = f"call {index} of the denoiser got NaN or infinite values in {name!r}; check the pipeline first"
                raise CalibrationError(msg)


def _batch_size(call: dict[str, Any], timestep: str) -> int:
    """Items of a call: axis 0 of its first tensor that is not the timestep."""
    leaves = pytree.tree_leaves({name: value for name, value in call.items() if name != timestep})
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _take_items(call: dict[str, Any], items: Tensor, batch: int, batched: Collection[str] | None) -> dict[str, Any]:
    """These items of a call of ``batch`` items; what has no batch axis stays whole."""

    def select(leaf: Tensor) -> Tensor:
        return leaf[items.to(leaf.device)] if leaf.ndim and len(leaf) == batch else leaf

    return {
        name: pytree.tree_map_only(Tensor, select, value) if batched is None or name in batched else value
        for name, value in call.items()
    }


def _select_samples(
    calls: list[dict[str, Any]],
    timestep: str,
    batched: Collection[str] | None,
    strategy: TimestepSampler,
    keep: int,
    horizon: int,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Keep samples, items of the calls: as many per timestep as the strategy says, drawn at random among them."""
    by_timestep: dict[float, list[tuple[int, int]]] = {}
    sizes = [_batch_size(call, timestep) for call in calls]
    for index, call in enumerate(calls):
        value = float(call[timestep].flatten()[0])
        by_timestep.setdefault(value, []).extend((index, item) for item in range(sizes[index]))
    capacity = torch.tensor([len(samples) for samples in by_timestep.values()])
    timesteps = torch.tensor(list(by_timestep), dtype=torch.float64)
    count = min(keep * len(timesteps), int(capacity.sum()))
    counts = place_samples(strategy, timesteps, count, capacity, horizon, generator)
    chosen: dict[int, list[int]] = {}
    for samples, number in zip(by_timestep.values(), counts.tolist(), strict=True):
        for position in torch.randperm(len(samples), generator=generator)[:number].tolist():
            index, item = samples[position]
            chosen.setdefault(index, []).append(item)
    batches = [
        _take_items(calls[index], torch.tensor(sorted(items)), sizes[index], batched) for index, items in chosen.items()
    ]
    order = torch.randperm(len(batches), generator=generator)
    return [batches[i] for i in order.tolist()]
