"""Cut the temporal block out of a graph: a small graph of time, and the rest, which takes what that computes as inputs.

::

    (timestep, labels) ─ time ─▶ features, timestep groups ─┐
    (all inputs) ───────────────────────────────────────────┴─ rest ─▶ result

Nothing in the rest depends on a schedule: neither a table nor the number of timesteps is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes import SetUnknownTimesteps
from tfmq_fx.passes.analysis import data_dependence, find_temporal_block, row_columns
from tfmq_fx.passes.analysis.temporal_block import repeated_last
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.subgraphs import extract_subgraph
from tfmq_fx.passes.support.timestep_row import ROW_OP
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups
from tfmq_fx.passes.temporal.tabulate_temporal_block import layer_behind
from tfmq_fx.temporal.rest_inputs import TemporalInput, replace_by_inputs
from tfmq_fx.temporal.time_graph import check_finite_outputs, checked_widths

__all__ = ["TemporalSplit", "split_temporal"]

#: Timesteps that stand for a schedule where none is known: such a block has no table.
ANY_TIMESTEPS = (1.0, 250.0, 500.0, 999.0)


@dataclass(frozen=True)
class TemporalSplit:
    """A graph in two parts, which share its tensors.

    Attributes:
        time: The time graph; it returns a tuple, one tensor per output.
        names: The inputs that its values depend on: the timestep, then those from a finite set.
        layers: For each output, the name of the layer that it comes from.
        inputs: What the rest takes from it, in the order of the rest's last inputs.
        rest: The rest. It is called with all inputs of the graph by position, flat, and with ``inputs`` behind them,
            and returns its results flat, as a tuple.
    """

    time: fx.GraphModule
    names: tuple[str, ...]
    layers: tuple[str, ...]
    inputs: tuple[TemporalInput, ...]
    rest: fx.GraphModule


def split_temporal(
    graph_module: fx.GraphModule, timestep: str = "timestep", timesteps: Tensor | None = None
) -> TemporalSplit | None:
    """Cut out what depends on the timestep, and on the finite inputs of the table, alone.

    Args:
        graph_module: A converted graph; it is not changed.
        timestep: Name of the timestep input.
        timesteps: The timesteps that it was made for, ``[K]``; where it has a table, that says so itself.

    Returns:
        The two parts; None where the rest reads nothing that depends on these inputs alone.

    Raises:
        PassError: A value of the time path depends on other timesteps of the batch too, or is NaN or infinite at one of
            these timesteps.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    rest = copy.deepcopy(graph_module, shared)
    columns = row_columns(rest)
    names = tuple(columns) or (timestep,)
    groups = {name: node for name in (GROUPS, EACH_TIMESTEP) if (node := find_groups(rest, name)) is not None}
    features = _feature_nodes(rest, names, set(groups.values()))
    outputs = [*groups.values(), *features]
    if not outputs or not all(_is_per_item_input(rest, name) for name in names):
        return None
    time = _time_graph(rest, names, outputs)
    layers = tuple(layer_behind(node) for node in outputs)
    examples = torch.tensor(ANY_TIMESTEPS, dtype=torch.float64) if timesteps is None else timesteps
    widths = checked_widths(time, columns or {timestep: examples}, layers)
    if columns or timesteps is not None:
        check_finite_outputs(time, columns or {timestep: examples}, layers, sum(widths))
    inputs = replace_by_inputs(rest, names, groups, features, widths)
    return TemporalSplit(time, names, layers, inputs, rest)


def _is_per_item_input(graph_module: fx.GraphModule, name: str) -> bool:
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder" and node.target == name]
    return bool(nodes) and isinstance(node_value(nodes[0]), Tensor) and node_value(nodes[0]).ndim < 2


def _feature_nodes(graph_module: fx.GraphModule, names: tuple[str, ...], groups: Collection[fx.Node]) -> list[fx.Node]:
    """What the rest reads of the time path, in order; its groups, and what is looked up by them, stand beside it."""
    group_path = _time_path_from(graph_module, groups)
    block = find_temporal_block(graph_module, names[0])
    path = set(block.nodes)
    if not block:
        # A table is all that is left of the block, or there was none; what the model computes itself stays in it.
        dependence, allowed = data_dependence(graph_module), frozenset(names)
        lookups = [node for node in graph_module.graph.nodes if is_call(node, ROW_OP)]
        lookup_path = _time_path_from(graph_module, lookups)
        path = {node for node in lookup_path if dependence[node] <= allowed}
        path -= repeated_last([node for node in graph_module.graph.nodes if node in path])
    path -= group_path
    inside = path | group_path
    return [
        node
        for node in graph_module.graph.nodes
        if node in path
        and node.op == "call_function"
        and isinstance(node_value(node), Tensor)
        and any(user not in inside for user in node.users)
    ]


def _time_path_from(graph_module: fx.GraphModule, sources: Collection[fx.Node]) -> set[fx.Node]:
    """``sources``, and every node whose arguments lead back to one of them through nodes of the time path alone."""
    reached: set[fx.Node] = set(sources)
    dependence = data_dependence(graph_module)
    sources_dependence = frozenset().union(*(dependence[node] for node in sources)) if sources else frozenset()
    for node in graph_module.graph.nodes:
        if any(source in reached for source in node.all_input_nodes) and dependence[node] <= sources_dependence:
            reached.add(node)
    return reached


def _time_graph(graph_module: fx.GraphModule, names: tuple[str, ...], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """What ``outputs`` need, with the sizes that they read; a timestep outside its table has the nearest row."""
    dependence, allowed = data_dependence(graph_module), frozenset(names)
    members: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node in members or node.op == "placeholder" or not dependence[node] <= allowed:
            continue
        members.add(node)
        queue.extend(node.all_input_nodes)
    time, inputs = extract_subgraph(graph_module, members, outputs)
    placeholders = [node for node in time.graph.nodes if node.op == "placeholder"]
    for inner, outer in zip(placeholders, inputs, strict=True):
        if outer.op == "placeholder":
            inner.target = outer.target
    output = time.graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    SetUnknownTimesteps("nearest", timestep=names[0])(time)
    time.recompile()
    return time
