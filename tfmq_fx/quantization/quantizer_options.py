"""What a quantizer was made with, checked; the steps of preparation read it and what it says of a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.roles import sample_inputs
from tfmq_fx.observers.registry import check_activation_observer
from tfmq_fx.passes.analysis import TemporalBlock, conditioning_inputs, find_temporal_block
from tfmq_fx.temporal.inputs import FiniteInputs

__all__ = ["QuantizerOptions", "schedule_values"]


@dataclass(frozen=True, eq=False)
class QuantizerOptions:
    """The arguments of :class:`tfmq_fx.TFMQQuantizer`.

    Attributes:
        config: What to quantize.
        timesteps: The timesteps of the schedule, float64 ``[K]``, or None.
        timestep: Name of the timestep input.
        finite: Names of the further inputs from a finite set, or their values by name.

    Raises:
        ConfigError: The observer that the configuration names is not registered here.
    """

    config: QuantizationConfig
    timesteps: Tensor | None
    timestep: str
    finite: FiniteInputs

    def __post_init__(self) -> None:
        """Ask for the observer itself: the configuration of a loaded program has its name only."""
        check_activation_observer(str(self.config.activation_range), grouped=(self.config.activation_groups or 1) > 1)

    def temporal_block(self, model: fx.GraphModule) -> TemporalBlock:
        """The temporal block of a graph, with the inputs from finite sets."""
        return find_temporal_block(model, self.timestep, finite=tuple(self.finite))

    def conditions(self, model: fx.GraphModule) -> tuple[str, ...]:
        """The further inputs that layers of the time path depend on, those of ``finite`` excepted."""
        samples = {str(node.target) for node in sample_inputs(model.graph, self.timestep)}
        names = conditioning_inputs(model, samples, self.timestep)
        return tuple(name for name in names if name not in self.finite)

    def required_timesteps(self, subject: str) -> Tensor:
        """The timesteps, which ``subject`` (a clause) needs.

        Raises:
            ConfigError: They were not given.
        """
        if self.timesteps is None:
            msg = (
                f"the model has {subject}, so its timesteps are needed: "
                "pass timesteps=scheduler.timesteps, or configure temporal='float'"
            )
            raise ConfigError(msg)
        return self.timesteps


def schedule_values(timesteps: Tensor | Iterable[float]) -> Tensor:
    """The timesteps of a schedule, float64 ``[K]``.

    Raises:
        ConfigError: There are none, or one is no finite real number.
    """
    if isinstance(timesteps, Tensor) and (timesteps.is_meta or timesteps.is_complex()):
        msg = f"timesteps must be real numbers that are there, not {timesteps.dtype} on {timesteps.device}"
        raise ConfigError(msg)
    try:
        numbers = timesteps if isinstance(timesteps, Tensor) else [float(t) for t in timesteps]
        values = torch.as_tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        msg = f"timesteps must be numbers, such as scheduler.timesteps: {error}"
        raise ConfigError(msg) from error
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        msg = (
            "timesteps must hold at least one value and only finite ones; pass scheduler.timesteps after set_timesteps"
        )
        raise ConfigError(msg)
    return values.reshape(-1)
