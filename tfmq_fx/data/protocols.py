"""What this package asks of a scheduler and of recorded batches: their shape, not their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["RecordedBatch", "Scheduler"]

#: Inputs of a denoiser by argument name, tensors with one entry per item of the batch among them.
RecordedBatch = Mapping[str, Any]


class Scheduler(Protocol):
    """A sampler: a schedule of timesteps and the step between two of them, as diffusers' schedulers have them."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings: ``num_train_timesteps``, ``prediction_type`` and others."""
        ...

    @property
    def timesteps(self) -> Tensor:
        """The timesteps that are visited, in order, ``[S]``; after :meth:`set_timesteps`."""
        ...

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """The factor that standard normal noise is multiplied with to start from."""
        ...

    def set_timesteps(self, num_inference_steps: int, /) -> None:
        """Choose the timesteps of a walk of this many steps."""
        ...

    def scale_model_input(self, sample: Tensor, timestep: Any, /) -> Tensor:
        """The denoiser's input for a state of the walk."""
        ...

    @property
    def step(self) -> Callable[..., Any]:
        """``step(model_output, timestep, sample)``: an output object with the next state as its ``prev_sample``."""
        ...
