"""A diffusers scheduler around another one: everything but ``step`` is the inner scheduler's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sized
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from tfmq_fx.data.protocols import Scheduler

__all__ = ["SchedulerWrapper", "with_sample"]


def with_sample(output: Any, sample: Tensor) -> Any:
    """A step's result (a tuple or an output object) with another ``prev_sample``."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(**{**output, "prev_sample": sample})


class SchedulerWrapper:
    """Passes everything on to a diffusers scheduler; subclasses change what ``step`` does.

    ``step`` has the signature of the inner scheduler's, which is what diffusers' pipelines look at before they pass
    ``eta`` or a generator, so a wrapper can stand where the scheduler stood: ``pipe.scheduler = wrapper``.

    Args:
        scheduler: A diffusers scheduler, or another wrapper. It is not copied.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    if TYPE_CHECKING:  # what __getattr__ finds: a wrapper is a scheduler
        config: Mapping[str, Any]
        timesteps: Tensor
        init_noise_sigma: float | Tensor

        def set_timesteps(self, num_inference_steps: int, /) -> None: ...  # noqa: D102
        def scale_model_input(self, sample: Tensor, timestep: Any, /) -> Tensor: ...  # noqa: D102

    def __getattr__(self, name: str) -> Any:
        """Whatever the wrapper has not is the inner scheduler's."""
        # Copies and pickles ask before there is an inner scheduler.
        if name == "scheduler" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __len__(self) -> int:
        """The number of training timesteps, as in diffusers."""
        return len(cast("Sized", self.scheduler))

    def __repr__(self) -> str:
        """The wrapper's name around its scheduler."""
        return f"{type(self).__name__}({self.scheduler!r})"

    @property
    def step(self) -> Callable[..., Any]:
        """The step of the inner scheduler as this wrapper takes it."""
        signature = inspect.signature(self.scheduler.step)

        # Made on access, so that a deep copy steps its own inner scheduler.
        @functools.wraps(self.scheduler.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            return self.take_step(signature.bind(*args, **kwargs).arguments)

        return step

    def take_step(self, arguments: dict[str, Any]) -> Any:
        """Take one step.

        Args:
            arguments: What ``step`` was called with, by name: ``model_output``, ``timestep``, ``sample`` and options.

        Returns:
            What the inner scheduler's ``step`` returns.
        """
        return self.scheduler.step(**arguments)

    def innermost(self) -> Scheduler:
        """The diffusers scheduler inside all wrappers."""
        inner = self.scheduler
        return inner.innermost() if isinstance(inner, SchedulerWrapper) else inner
