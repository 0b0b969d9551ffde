"""Cut the temporal block out of a graph: a small graph of time, and the rest, which takes what that computes as inputs.

::

    (timestep, labels) ─ time ─▶ features, timestep groups ─┐
    (all inputs) ───────────────────────────────────────────┴─ rest ─▶ result

Nothing in the rest depends on a schedule: neither a table nor the number of timesteps is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes import SetUnknownTimesteps, StripDeadState
from tfmq_fx.passes.analysis import data_dependence, find_temporal_block, row_columns
from tfmq_fx.passes.analysis.temporal_block import repeated_last
from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of, insert_call, redirect_users
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.subgraphs import extract_subgraph
from tfmq_fx.passes.support.timestep_row import ROW_OP
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, GROUPS_INPUT, find_groups
from tfmq_fx.passes.temporal.tabulate_temporal_block import layer_behind, shaped_feature
from tfmq_fx.temporal.extend import evaluate_in_fours, not_finite

__all__ = ["TemporalInput", "TemporalSplit", "outputs_of", "split_temporal"]

aten = torch.ops.aten
#: Rows that are evaluated in both orders, to see that each depends on its own timestep alone.
ROWS_COMPARED = 64
#: Rows of the table that are evaluated to see that all values are finite, evenly drawn where it has more.
MOST_ROWS = 4096
#: Numbers that are held at once while this is seen.
MOST_NUMBERS = 2**26
#: Timesteps that stand for a schedule where none is known: such a block has no table.
ANY_TIMESTEPS = (1.0, 250.0, 500.0, 999.0)


@dataclass(frozen=True)
class TemporalInput:
    """An input of the rest that the time graph computes.

    Attributes:
        name: What the rest calls it.
        outputs: The outputs of the time graph that it holds, each flattened to one row per item, side by side.
        matrix: Whether it is ``[n, width]``; the timestep groups are ``[n]``.
    """

    name: str
    outputs: tuple[int, ...]
    matrix: bool


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


def outputs_of(time: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values a time graph returns, in order."""
    return pytree.tree_leaves(time.graph.output_node().args[0])


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
    features = _features(rest, names, set(groups.values()))
    outputs = [*groups.values(), *features]
    if not outputs or not all(_is_input(rest, name) for name in names):
        return None
    time = _time_graph(rest, names, outputs)
    layers = tuple(layer_behind(node) for node in outputs)
    tried = torch.tensor(ANY_TIMESTEPS, dtype=torch.float64) if timesteps is None else timesteps
    widths = _checked_widths(time, columns or {timestep: tried}, layers)
    if columns or timesteps is not None:
        _require_finite(time, columns or {timestep: tried}, layers, sum(widths))
    inputs = _take(rest, names, groups, features, widths)
    return TemporalSplit(time, names, layers, inputs, rest)


def _is_input(graph_module: fx.GraphModule, name: str) -> bool:
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder" and node.target == name]
    return bool(nodes) and isinstance(node_value(nodes[0]), Tensor) and node_value(nodes[0]).ndim < 2


def _features(graph_module: fx.GraphModule, names: tuple[str, ...], groups: Collection[fx.Node]) -> list[fx.Node]:
    """What the rest reads of the time path, in order; its groups, and what is looked up by them, stand beside it."""
    behind_groups = _behind(graph_module, groups)
    block = find_temporal_block(graph_module, names[0])
    path = set(block.nodes)
    if not block:
        # A table is all that is left of the block, or there was none; what the model computes itself stays in it.
        dependence, allowed = data_dependence(graph_module), frozenset(names)
        looked_up = _behind(graph_module, [node for node in graph_module.graph.nodes if is_call(node, ROW_OP)])
        path = {node for node in looked_up if dependence[node] <= allowed}
        path -= repeated_last([node for node in graph_module.graph.nodes if node in path])
    path -= behind_groups
    inside = path | behind_groups
    return [
        node
        for node in graph_module.graph.nodes
        if node in path
        and node.op == "call_function"
        and isinstance(node_value(node), Tensor)
        and any(user not in inside for user in node.users)
    ]


def _behind(graph_module: fx.GraphModule, sources: Collection[fx.Node]) -> set[fx.Node]:
    """``sources``, and every node whose arguments lead back to one of them through nodes of the time path alone."""
    found: set[fx.Node] = set(sources)
    dependence = data_dependence(graph_module)
    timed = frozenset().union(*(dependence[node] for node in sources)) if sources else frozenset()
    for node in graph_module.graph.nodes:
        if any(source in found for source in node.all_input_nodes) and dependence[node] <= timed:
            found.add(node)
    return found


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


def _checked_widths(time: fx.GraphModule, columns: Mapping[str, Tensor], layers: Sequence[str]) -> list[int]:
    """How many numbers each output has per item; refuses what could not be kept by its timestep."""
    outputs, nodes, few = outputs_of(time), set(time.graph.nodes), _drawn(columns, ROWS_COMPARED)
    together = evaluate_in_fours(time, nodes, outputs, few)
    turned = evaluate_in_fours(time, nodes, outputs, {name: column.flip(0) for name, column in few.items()})
    rows = len(next(iter(few.values())))
    widths = []
    for value, back, layer in zip(together, turned, layers, strict=True):
        flat, other = (tensor.reshape(rows, -1) for tensor in (value, back.to(value.dtype)))
        if not torch.allclose(flat, other.flip(0), rtol=1e-4, atol=1e-5, equal_nan=True):
            msg = (
                f"the rows of the temporal feature of {layer!r} do not each depend on their own timestep alone; keep "
                "the block in the graph instead (tabulate=False)"
            )
            raise PassError(msg)
        widths.append(flat.shape[1])
    return widths


def _drawn(columns: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """At most this many rows, evenly drawn."""
    count = len(next(iter(columns.values())))
    picked = torch.linspace(0, count - 1, min(most, count)).round().long()
    return {name: column[picked] for name, column in columns.items()}


def _require_finite(time: fx.GraphModule, columns: Mapping[str, Tensor], layers: Sequence[str], width: int) -> None:
    """Refuse rows that would make a result of NaN at their timestep; the error names both."""
    nodes, outputs, many = set(time.graph.nodes), outputs_of(time), _drawn(columns, MOST_ROWS)
    size = max(1, MOST_NUMBERS // max(1, width))
    for start in range(0, len(next(iter(many.values()))), size):
        part = {name: column[start : start + size] for name, column in many.items()}
        values = evaluate_in_fours(time, nodes, outputs, part)
        if found := not_finite(values, part, [f"the temporal feature of {layer!r}" for layer in layers]):
            msg = f"{found}; leave that value out of the table, or mend the model"
            raise PassError(msg)


# -- the rest ----------------------------------------------------------------------------------------------------------


def _take(
    rest: fx.GraphModule,
    names: tuple[str, ...],
    groups: Mapping[str, fx.Node],
    features: Sequence[fx.Node],
    widths: Sequence[int],
) -> tuple[TemporalInput, ...]:
    """Replace groups and features by inputs, in place; those of one dtype are one input."""
    inputs = []
    for number, (name, node) in enumerate(groups.items()):
        given = _add_input(rest, name, (_items(rest, names),), node_value(node).dtype)
        given.meta[GROUPS_INPUT] = name
        node.replace_all_uses_with(given)
        inputs.append(TemporalInput(str(given.target), (number,), matrix=False))
    numbered = list(zip(features, range(len(groups), len(widths)), widths[len(groups) :], strict=True))
    for dtype in dict.fromkeys(node_value(node).dtype for node in features):
        group = [entry for entry in numbered if node_value(entry[0]).dtype == dtype]
        shape = (_items(rest, names), sum(width for _, _, width in group))
        given = _add_input(rest, "temporal_features", shape, dtype)
        _slice(rest.graph, given, [(node, width) for node, _, width in group])
        inputs.append(TemporalInput(str(given.target), tuple(number for _, number, _ in group), matrix=True))
    graph = rest.graph
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    graph.set_codegen(fx.graph.CodeGen())
    graph.eliminate_dead_code()
    StripDeadState()(rest)
    rest.recompile()
    return tuple(inputs)


def _items(graph_module: fx.GraphModule, names: Collection[str]) -> int | SymInt:
    """The number of items that a call has timesteps for: the batch, or 1."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder" and node.target in names]
    return next((node_value(node).shape[0] for node in inputs if node_value(node).ndim), 1)


def _add_input(graph_module: fx.GraphModule, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
    """Insert an input behind the last one."""
    graph = graph_module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.create_node("placeholder", name, name=name)
    node.target = node.name
    node.meta["val"] = compute_value(fake_mode_of(graph), torch.empty, (shape,), {"dtype": dtype})
    return node


def _slice(graph: fx.Graph, given: fx.Node, features: Sequence[tuple[fx.Node, int]]) -> None:
    """Read the features from where they lie side by side."""
    start = 0
    with graph.inserting_after(given):
        items = insert_call(graph, aten.select.int, (given, 1, 0), anchor=features[0][0])
    following = items.next
    for node, width in features:
        with graph.inserting_before(following):
            piece = insert_call(graph, aten.slice.Tensor, (given, 1, start, start + width), anchor=node)
            shaped = shaped_feature(graph, piece, items, node)
        redirect_users(node, shaped)
        start += width
