"""What a denoiser is called with: the shape of its sample, and its inputs by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tfmq_fx.errors import ConfigError

__all__ = ["ModelInputs", "sample_shape"]


def sample_shape(config: Mapping[str, Any] | None, model: str) -> tuple[int, ...]:
    """Shape of one sample, ``(channels, height, width)``.

    Args:
        config: The diffusers configuration: ``in_channels``, and ``sample_size`` as a side or a pair.
        model: Name of the model, for the message.

    Raises:
        ConfigError: There is no configuration, or it lacks one of the two.
    """
    config = config or {}
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        msg = f"{model} has no config with in_channels and sample_size; pass shape=(channels, height, width)"
        raise ConfigError(msg)
    return (int(channels), *((size, size) if isinstance(size, int) else map(int, size)))


@dataclass(frozen=True)
class ModelInputs:
    """How the denoiser is called: the names of its sample and timestep, and its further inputs."""

    sample: str
    timestep: str
    extra: Mapping[str, Any]
    samples: int
    timestep_as_batch: bool

    @classmethod
    def of(
        cls, model: nn.Module, timestep: str, extra: Mapping[str, Any], samples: int, timestep_as_batch: bool
    ) -> ModelInputs:
        """Check the model's signature and the extra inputs.

        Raises:
            ConfigError: The model takes no timestep, or an extra tensor is of another number of trajectories.
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

    def bind(self, x: Tensor, timestep: Tensor, trajectories: Tensor) -> dict[str, Any]:
        """The inputs by name for these trajectories at one timestep."""

        def select(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if len(value) == 1:
                return value.expand(len(trajectories), *value.shape[1:]).contiguous().to(x.device)
            return value[trajectories.to(value.device)].to(x.device)

        t = timestep.expand(len(trajectories)).clone() if self.timestep_as_batch else timestep.clone()
        return {self.sample: x, self.timestep: t, **{name: select(value) for name, value in self.extra.items()}}
