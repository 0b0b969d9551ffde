"""Whether a model takes several timesteps for each item of the batch."""

from __future__ import annotations

from tfmq_fx.passes.support.predicates import node_value
from torch import Tensor, fx

__all__ = ["several_timesteps"]


def several_timesteps(graph_module: fx.GraphModule, timestep: str = "timestep") -> int:
    """The number of axes of the timestep input where it has more than one, such as one value per token; else 0."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.target == timestep:
            value = node_value(node)
            return value.ndim if isinstance(value, Tensor) and value.ndim > 1 else 0
    return 0
