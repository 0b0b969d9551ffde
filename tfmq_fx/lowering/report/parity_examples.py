"""Calls that a lowered program is compared on: noise, and timesteps from all over the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx.frontend.examples import EXAMPLE_BATCH, example_arguments
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.sizes import concrete_size

__all__ = ["parity_examples"]

#: Rows of the table that are looked at, at the least: the first, the last and one between them.
FEWEST_TABLE_ROWS = 3
#: Calls, at the least and at the most: between them, as many as stay below so many computed numbers, about a second.
FEWEST_CALLS, MOST_CALLS = 2, 8
NUMBERS = 2**26


def parity_examples(
    graph_module: fx.GraphModule, indexed: Mapping[str, Tensor], timestep: str, *, one_timestep: bool
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Make calls ``(args, kwargs)``, each with noise of its own.

    The timesteps of all calls together are spread evenly over the table, its first and last row among them, and so are
    the values of further finite inputs. A large model gets few calls, because each is run in eager mode too.

    Args:
        graph_module: The quantized program's graph.
        indexed: By name, the values of every input that comes from a finite set, ``[K]``, in the order of the table.
        timestep: Name of the timestep input.
        one_timestep: Whether a call has one timestep in all its items, as kernels of one timestep group need it.
    """
    inputs = {str(node.target): node_value(node) for node in graph_module.graph.nodes if node.op == "placeholder"}
    widths = {name: _item_count(inputs[name]) for name in indexed}
    if one_timestep:
        widths[timestep] = 1
    rows_per_call = widths.get(timestep, FEWEST_TABLE_ROWS)
    calls = min(max(NUMBERS // _computed_numbers(graph_module), FEWEST_CALLS), MOST_CALLS)
    calls = max(calls, math.ceil(FEWEST_TABLE_ROWS / rows_per_call))
    examples = []
    for call in range(calls):
        chosen = {
            name: values[_row_numbers(len(values), widths[name], calls, call)] for name, values in indexed.items()
        }
        examples.append(example_arguments(graph_module, chosen, seed=call))
    return examples


def _item_count(value: Tensor) -> int:
    """The entries of an input of one value an item."""
    if not value.ndim:
        return 1
    return EXAMPLE_BATCH if isinstance(value.shape[0], SymInt) else int(value.shape[0])


def _row_numbers(count: int, width: int, calls: int, call: int) -> Tensor:
    """The rows out of ``count`` that a call takes: far from each other, and all calls together evenly spread."""
    spread = torch.linspace(0, count - 1, width * calls).round().long()
    return spread[call::calls]


def _computed_numbers(graph_module: fx.GraphModule) -> int:
    """The numbers in all tensors that a call computes."""
    values = [node_value(node) for node in graph_module.graph.nodes if node.op == "call_function"]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    total: int = sum(math.prod(concrete_size(size, EXAMPLE_BATCH) for size in shape) for shape in shapes)
    return max(1, total)
