"""A call that can be made up for a captured program: noise, at some of the timesteps that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.frontend.binding import Call, bind
from tfmq_fx.frontend.examples import EXAMPLE_BATCH, example_arguments
from tfmq_fx.frontend.interface import Interface, TensorInput
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["drawn_call"]


def drawn_call(
    graph_module: fx.GraphModule, interface: Interface, indexed: Mapping[str, Tensor], timestep: str, seed: int
) -> Call:
    """A call with normal noise in the place of samples and conditionings, and nothing masked.

    Where the program takes a timestep per item, the items have timesteps of their own, from the noisiest on in equal
    distances.

    Args:
        graph_module: A captured graph, at any later stage.
        interface: Its interface.
        indexed: By name, the values that inputs of finite sets are taken from, ``[K]``.
        timestep: Name of the timestep input.
        seed: Of the noise.
    """
    chosen = dict(indexed)
    if timestep in chosen:
        values = chosen[timestep].sort(descending=True).values
        items = _items(graph_module, timestep)
        chosen[timestep] = values[torch.arange(items) * len(values) // items]
    args, kwargs = example_arguments(graph_module, chosen, seed=seed)
    call = bind(interface, args, kwargs, timestep)
    for index, entry in enumerate(interface.inputs):
        if isinstance(entry, TensorInput):
            call.leaves[index] = _unmasked(entry, call.leaves[index])
    return call


def _items(graph_module: fx.GraphModule, timestep: str) -> int:
    """The timesteps of one call."""
    inputs = graph_module.graph.find_nodes(op="placeholder")
    value: Any = next(node_value(node) for node in inputs if node.target == timestep)
    if not value.ndim:
        return 1
    return int(value.shape[0]) if isinstance(value.shape[0], int) else EXAMPLE_BATCH


def _unmasked(entry: TensorInput, value: Tensor) -> Tensor:
    if entry.dtype is torch.bool:
        return torch.ones_like(value)
    return torch.zeros_like(value) if entry.mask else value
