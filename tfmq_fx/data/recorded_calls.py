"""The calls of a denoiser while its pipeline runs, and the choice of those that are kept for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx._torch import pytree
from tfmq_fx.data.timestep_samplers import TimestepSampler, place_samples
from tfmq_fx.errors import CalibrationError

__all__ = ["CallRecorder", "check_call", "select_samples"]


class CallRecorder:
    """Watches a module; a context manager, behind which the module is as it was.

    Args:
        module: The denoiser.
        timestep: Name of its timestep argument; None where it has none.

    Attributes:
        calls: The inputs of every call by argument name, detached and cloned. ``return_dict`` is left
            out, and so are inputs that were None where that is their default.
    """

    def __init__(self, module: nn.Module, timestep: str | None) -> None:
        self.module, self.timestep = module, timestep
        self.calls: list[dict[str, Any]] = []
        self._signature = inspect.signature(module.forward)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(self._signature.bind(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        inputs = {name: value for name, value in bound.items() if self._is_kept(name, value)}
        known = self.timestep
        if known is not None and isinstance(inputs.get(known), (int, float)):  # a number could not be a graph's input
            inputs[known] = torch.tensor(inputs[known])
        self.calls.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs))

    def _is_kept(self, name: str, value: Any) -> bool:
        """Whether a call needs this argument to be made again; what has no default may have been given None."""
        parameter = self._signature.parameters.get(name)
        required = parameter is not None and parameter.default is parameter.empty
        return name != "return_dict" and (value is not None or required)

    def __enter__(self) -> CallRecorder:
        """Start watching."""
        self._handle = self.module.register_forward_pre_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self._handle.remove()


def check_call(index: int, call: dict[str, Any], timestep: str | None) -> None:
    """Raise :class:`CalibrationError` where a recorded call has no timestep, or NaN."""
    if timestep is not None and not isinstance(call.get(timestep), Tensor):
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


def _batch_size(call: dict[str, Any], timestep: str | None) -> int:
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


def select_samples(
    calls: list[dict[str, Any]],
    timestep: str | None,
    batched: Collection[str] | None,
    strategy: TimestepSampler,
    keep: int,
    horizon: int,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Keep samples, items of the calls: as many per timestep as the strategy says, drawn at random among them.

    Args:
        calls: What a :class:`CallRecorder` saw.
        timestep: Name of the timestep argument; None takes all calls for those of one timestep.
        batched: As for :func:`tfmq_fx.record_trajectories`.
        strategy: How samples are spread over timesteps.
        keep: Samples kept per distinct timestep on average.
        horizon: The number of training timesteps.
        generator: Draws them.

    Returns:
        One batch per call of which samples are kept, in random order.
    """
    by_timestep: dict[float, list[tuple[int, int]]] = {}
    sizes = [_batch_size(call, timestep) for call in calls]
    for index, call in enumerate(calls):
        value = 0.0 if timestep is None else float(call[timestep].flatten()[0])
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
