"""A unit learns only from finite values of the float model."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.errors import NonFiniteError
from tfmq_fx.observers.finite import require_finite
from tfmq_fx.reconstruction.propagation import Propagation
from tfmq_fx.reconstruction.samples import Window
from tfmq_fx.reconstruction.values import in_window, placeholder_value
from tfmq_fx.temporal.refusal import at_timesteps

__all__ = ["require_finite_targets"]


def require_finite_targets(propagation: Propagation, node: fx.Node, timestep: str) -> None:
    """Refuse a unit whose float output holds NaN or infinite values.

    Args:
        propagation: Has computed ``node`` for the float model.
        node: The unit's call.
        timestep: Name of the timestep input.

    Raises:
        NonFiniteError: It does; the error names the unit, the batches and the timesteps.
    """
    subject = f"the output of unit {node.meta['tfmq_fx.unit'][0]!r}"
    for window in propagation.samples.chunks:
        for leaf in pytree.tree_leaves(in_window(propagation.float_values[node], window)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                try:
                    require_finite(*torch.aminmax(leaf), leaf, subject)
                except NonFiniteError as error:
                    raise error.at(_describe_place(propagation, window, timestep, error)) from error


def _describe_place(propagation: Propagation, window: Window, timestep: str, error: NonFiniteError) -> str:
    samples = propagation.samples
    each = max(1, error.length // len(window))
    refused = sorted({min(window.start + entry // each, window.stop - 1) for entry in error.entries})
    batches = sorted(set(samples.origins[refused].tolist()))
    place = f" in calibration batch{'es' if len(batches) > 1 else ''} {', '.join(map(str, batches))}"
    inputs = [str(node.target) for node in propagation.graph_module.graph.nodes if node.op == "placeholder"]
    if timestep not in inputs:
        return place
    column = samples.inputs[inputs.index(timestep)]
    if isinstance(column, Tensor):
        return f"{place},{at_timesteps(column[refused])}"
    return f"{place},{at_timesteps(torch.as_tensor(placeholder_value(column).at(window)))}"
