"""The quantized program: a q/dq graph with integer weights, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.config import QuantizationConfig
from tfmq_fx.passes.index_timesteps import find_row, row_values

__all__ = ["QuantizedProgram"]


@dataclass
class QuantizedProgram:
    """The result of :func:`tfmq_fx.convert`: save it, load it, lower it, or call it.

    Attributes:
        graph_module: The quantize/dequantize graph; calling it gives the reference numerics.
        config: The configuration it was quantized with.
        timestep: Name of the timestep input.
        kept_float: Layers that stay float on purpose, with the reason for each.
        interface: Class name and diffusers configuration of the model that came in.
        scheduler: Configuration of the scheduler whose timesteps it serves, when it is known.
    """

    graph_module: fx.GraphModule
    config: QuantizationConfig
    timestep: str = "timestep"
    kept_float: dict[str, str] = field(default_factory=dict)
    interface: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def timesteps(self) -> Tensor | None:
        """The timesteps that the program serves, float64 ``[K]``; None when it has no table."""
        row = find_row(self.graph_module)
        return None if row is None else row_values(self.graph_module, row).clone()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph eagerly with the captured argument structure."""
        return self.graph_module(*args, **kwargs)
