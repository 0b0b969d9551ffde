"""The values of a time graph: which nodes they are, and what they must be to be kept by their timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes.base import PassError
from tfmq_fx.temporal.extend import describe_non_finite, evaluate_padded

__all__ = ["check_finite_outputs", "checked_widths", "outputs_of"]

#: Rows that are evaluated in both orders, to see that each depends on its own timestep alone.
ROWS_COMPARED = 64
#: Rows of the table that are evaluated to see that all values are finite, evenly drawn where it has more.
MOST_ROWS = 4096
#: Numbers that are held at once while this is seen.
MOST_NUMBERS = 2**26


def outputs_of(time: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values a time graph returns, in order."""
    return pytree.tree_leaves(time.graph.output_node().args[0])


def checked_widths(time: fx.GraphModule, columns: Mapping[str, Tensor], layers: Sequence[str]) -> list[int]:
    """How many numbers each output has per item; refuses what could not be kept by its timestep.

    Args:
        time: The time graph.
        columns: By name of an input, its value in every row, ``[K]``.
        layers: For each output, the name of the layer that it comes from.

    Raises:
        PassError: A value depends on other timesteps of the batch too.
    """
    outputs, nodes, compared = outputs_of(time), set(time.graph.nodes), _evenly_sampled(columns, ROWS_COMPARED)
    forward = evaluate_padded(time, nodes, outputs, compared)
    backward = evaluate_padded(time, nodes, outputs, {name: column.flip(0) for name, column in compared.items()})
    rows = len(next(iter(compared.values())))
    widths = []
    for value, reversed_value, layer in zip(forward, backward, layers, strict=True):
        flat, other = (tensor.reshape(rows, -1) for tensor in (value, reversed_value.to(value.dtype)))
        if not torch.allclose(flat, other.flip(0), rtol=1e-4, atol=1e-5, equal_nan=True):
            msg = (
                f"the rows of the temporal feature of {layer!r} do not each depend on their own timestep alone; keep "
                "the block in the graph instead (tabulate=False)"
            )
            raise PassError(msg)
        widths.append(flat.shape[1])
    return widths


def _evenly_sampled(columns: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """At most this many rows, evenly drawn."""
    count = len(next(iter(columns.values())))
    picked = torch.linspace(0, count - 1, min(most, count)).round().long()
    return {name: column[picked] for name, column in columns.items()}


def check_finite_outputs(
    time: fx.GraphModule, columns: Mapping[str, Tensor], layers: Sequence[str], width: int
) -> None:
    """Refuse rows that would make a result of NaN at their timestep.

    Args:
        time: The time graph.
        columns: By name of an input, its value in every row, ``[K]``.
        layers: For each output, the name of the layer that it comes from.
        width: Numbers per row, of all outputs together.

    Raises:
        PassError: Names the layer and the timestep.
    """
    nodes, outputs, sampled = set(time.graph.nodes), outputs_of(time), _evenly_sampled(columns, MOST_ROWS)
    chunk = max(1, MOST_NUMBERS // max(1, width))
    for start in range(0, len(next(iter(sampled.values()))), chunk):
        columns_of_chunk = {name: column[start : start + chunk] for name, column in sampled.items()}
        values = evaluate_padded(time, nodes, outputs, columns_of_chunk)
        if problem := describe_non_finite(
            values, columns_of_chunk, [f"the temporal feature of {layer!r}" for layer in layers]
        ):
            msg = f"{problem}; leave that value out of the table, or mend the model"
            raise PassError(msg)
