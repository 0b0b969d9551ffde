"""The quantized program: a q/dq graph with integer weights, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.config import QuantizationConfig

__all__ = ["QuantizedProgram"]


@dataclass
class QuantizedProgram:
    """The result of :func:`tfmq_fx.convert`: save it, load it, lower it, or call it.

    Attributes:
        graph_module: The quantize/dequantize graph; calling it gives the reference numerics.
        config: The configuration it was quantized with.
        timestep: Name of the timestep input.
        timesteps: The timesteps that it serves, float64 ``[K]``; None for a model without a temporal block.
        kept_float: Layers that stay float on purpose, with the reason for each.
        interface: Class name and diffusers configuration of the model that came in.
        scheduler: Configuration of the scheduler whose timesteps it serves, when it is known.
    """

    graph_module: fx.GraphModule
    config: QuantizationConfig
    timestep: str = "timestep"
    timesteps: Tensor | None = None
    kept_float: dict[str, str] = field(default_factory=dict)
    interface: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph eagerly with the captured argument structure."""
        return self.graph_module(*args, **kwargs)
