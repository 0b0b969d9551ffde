"""A schedule meets the dtype of a graph: fractional timesteps where it has integers, and what bfloat16 blurs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.interface import refresh_interface
from tfmq_fx.passes import WidenTimesteps
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps
from tfmq_fx.passes.temporal.widen_timesteps import integer_reader

__all__ = ["accept_timesteps"]


def accept_timesteps(graph_module: fx.GraphModule, timesteps: Tensor, timestep: str = "timestep") -> None:
    """Let a graph take these timesteps, in place: where they are fractional and its input has integers, as float32.

    Euler's schedules and Karras' sigmas are fractional, and models are often captured with whole timesteps.

    Args:
        graph_module: A captured, prepared or converted graph.
        timesteps: The timesteps that it is to serve.
        timestep: Name of its timestep input; a graph without one is left alone.

    Raises:
        ConfigError: They are fractional, and the graph needs integers: it would truncate them. Or two of them are one
            number in the dtype of the input.
    """
    inputs = {str(node.target): node_value(node) for node in graph_module.graph.nodes if node.op == "placeholder"}
    value, values = inputs.get(timestep), distinct_timesteps(timesteps)
    if not isinstance(value, Tensor):
        return
    dtype = value.dtype
    fractional = values[values != values.round()]
    if len(fractional) and not dtype.is_floating_point:
        reader = integer_reader(graph_module, timestep)
        if reader is not None:
            msg = (
                f"timestep {float(fractional[0]):g} is fractional, but the model was captured with {_name(dtype)} "
                f"timesteps and {reader.name!r} takes them as integers: capture it again with a float timestep"
            )
            raise ConfigError(msg)
        WidenTimesteps(timestep=timestep)(graph_module)
        refresh_interface(graph_module)
        dtype = torch.float32
    rows, _ = ValueSearch(values).find(values.to(dtype))
    blurred = rows != torch.arange(len(values))
    if bool(blurred.any()):
        msg = (
            f"timestep {float(values[blurred][0]):.9g} cannot be told from its neighbours in {_name(dtype)}, which the "
            "model was captured with: capture it with a float32 timestep, or leave one of them out"
        )
        raise ConfigError(msg)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
