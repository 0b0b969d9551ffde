"""The rest of a split graph: what the time graph computes becomes inputs of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes import StripDeadState
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of, insert_call, redirect_users
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.temporal.group_timesteps import GROUPS_INPUT
from tfmq_fx.passes.temporal.tabulate_temporal_block import shaped_feature

__all__ = ["TemporalInput", "replace_by_inputs"]

aten = torch.ops.aten


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


def replace_by_inputs(
    rest: fx.GraphModule,
    names: tuple[str, ...],
    groups: Mapping[str, fx.Node],
    features: Sequence[fx.Node],
    widths: Sequence[int],
) -> tuple[TemporalInput, ...]:
    """Replace groups and features by inputs, in place; features of one dtype are one input.

    Args:
        rest: The graph.
        names: The inputs that the time graph reads.
        groups: By name, the nodes of the timestep groups; they are the first outputs of the time graph.
        features: The nodes of the features; they are its other outputs, in order.
        widths: Numbers per item of each output of the time graph.

    Returns:
        The inputs, in the order in which they stand behind the graph's own.
    """
    inputs = []
    for number, (name, node) in enumerate(groups.items()):
        placeholder = _add_input(rest, name, (_batch_size(rest, names),), node_value(node).dtype)
        placeholder.meta[GROUPS_INPUT] = name
        node.replace_all_uses_with(placeholder)
        inputs.append(TemporalInput(str(placeholder.target), (number,), matrix=False))
    numbered = list(zip(features, range(len(groups), len(widths)), widths[len(groups) :], strict=True))
    for dtype in dict.fromkeys(node_value(node).dtype for node in features):
        group = [entry for entry in numbered if node_value(entry[0]).dtype == dtype]
        shape = (_batch_size(rest, names), sum(width for _, _, width in group))
        placeholder = _add_input(rest, "temporal_features", shape, dtype)
        _slice_features(rest.graph, placeholder, [(node, width) for node, _, width in group])
        inputs.append(TemporalInput(str(placeholder.target), tuple(number for _, number, _ in group), matrix=True))
    graph = rest.graph
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)
    graph.set_codegen(fx.graph.CodeGen())
    graph.eliminate_dead_code()
    StripDeadState()(rest)
    rest.recompile()
    return tuple(inputs)


def _batch_size(graph_module: fx.GraphModule, names: Collection[str]) -> int | SymInt:
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


def _slice_features(graph: fx.Graph, placeholder: fx.Node, features: Sequence[tuple[fx.Node, int]]) -> None:
    """Read the features from where they lie side by side."""
    start = 0
    with graph.inserting_after(placeholder):
        items = insert_call(graph, aten.select.int, (placeholder, 1, 0), anchor=features[0][0])
    next_node = items.next
    for node, width in features:
        with graph.inserting_before(next_node):
            piece = insert_call(graph, aten.slice.Tensor, (placeholder, 1, start, start + width), anchor=node)
            shaped = shaped_feature(graph, piece, items, node)
        redirect_users(node, shaped)
        start += width
