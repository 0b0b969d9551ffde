"""Read the table row of a graph: the node, the inputs it is computed from, and their values.

The row is one node. With the timestep alone it is the lookup itself; with further finite inputs, such as class
labels, every combination has a row, the timestep's changing slowest::

    %t = timestep_row(%timestep, …)      %c = timestep_row(%class_labels, …)      %row = add(mul(%t, 10), %c)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.timestep_row import ROW_OP

__all__ = ["find_row", "require_row", "row_columns", "row_inputs", "row_lookups", "row_values", "several_timesteps"]


def row_lookups(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The lookup of each indexed input, the timestep's first; empty without a table."""
    return [node for node in graph_module.graph.nodes if is_call(node, ROW_OP)]


def find_row(graph_module: fx.GraphModule) -> fx.Node | None:
    """The node that computes the table row, or None."""
    lookups = row_lookups(graph_module)
    if len(lookups) < 2:
        return lookups[0] if lookups else None
    (joint,) = lookups[-1].users
    return joint


def require_row(graph_module: fx.GraphModule, pass_id: str) -> fx.Node:
    """The node that computes the table row, for the pass of that id.

    Raises:
        PassError: There is none.
    """
    row = find_row(graph_module)
    if row is None:
        msg = f"{pass_id}: the graph has no timestep row; run IndexTimesteps first"
        raise PassError(msg)
    return row


def row_values(graph_module: fx.GraphModule, lookup: fx.Node) -> Tensor:
    """The values behind a lookup, float64 ``[K]``."""
    values = read_attribute(graph_module, str(argument_node(lookup, 1).target))
    assert isinstance(values, Tensor)
    return values


def row_inputs(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """The distinct values of each indexed input by name, float64, the timestep first; empty without a table."""
    lookups = row_lookups(graph_module)
    return {str(argument_node(node, 0).target): row_values(graph_module, node) for node in lookups}


def row_columns(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """What stands behind each row of the table: by the name of an indexed input, its value in every row.

    Returns:
        Float64 ``[K]`` per input, ``K`` the number of rows, the timestep first; empty without a table.
    """
    values = row_inputs(graph_module)
    grids = torch.meshgrid(*values.values(), indexing="ij") if values else ()
    return {name: grid.reshape(-1) for name, grid in zip(values, grids, strict=True)}


def several_timesteps(graph_module: fx.GraphModule, timestep: str = "timestep") -> int:
    """The number of axes of the timestep input where it has more than one, such as one value per token; else 0."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.target == timestep:
            value = node_value(node)
            return value.ndim if isinstance(value, Tensor) and value.ndim > 1 else 0
    return 0
