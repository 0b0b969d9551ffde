"""A model to try, with inputs that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Example", "Factory", "discrete", "normal"]


def discrete(steps: int = 10) -> Tensor:
    """Timesteps of a schedule of 1,000, largest first."""
    return torch.arange(0, 1000, 1000 // steps).flip(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values that do not depend on what was drawn before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Example:
    """One architecture with random weights.

    Attributes:
        model: The model, in evaluation mode.
        inputs: Its inputs by name, of a batch of 2, the timestep among them.
        timestep: Name of the timestep input.
        timesteps: A schedule, in the units that the model takes.
        dynamic_batch: Whether the batch can be symbolic.
    """

    model: nn.Module
    inputs: dict[str, Any]
    timestep: str = "timestep"
    timesteps: Tensor = field(default_factory=discrete)
    dynamic_batch: bool = True


Factory = Callable[[], Example]
