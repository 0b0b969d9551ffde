"""Serve further timesteps: the temporal block needs no data, so neither do new rows of its tables.

Each quantizer of the block has one set of parameters per row of the table, from the range of what it sees there. A new
row's are computed the same way: the block is run over the new timesteps, and what reaches a quantizer has passed those
before it, whose new parameters are final by then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.errors import TimestepError
from tfmq_fx.observers.ranges import asymmetric_parameters
from tfmq_fx.passes.analysis import (
    evaluate_temporal_nodes,
    find_temporal_block,
    layer_name,
    row_columns,
    row_lookups,
    row_values,
)
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call, is_weighted
from tfmq_fx.passes.support.timestep_row import ROW_OP
from tfmq_fx.passes.support.timestep_values import ValueSearch
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups

__all__ = ["describe_non_finite", "evaluate_padded", "extend_rows", "find_row_quantizers", "is_indexed_by_row"]

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
#: A smaller batch is computed by other kernels, which round differently: a timestep's parameters and features should
#: be the same whatever comes with it.
BATCH_MULTIPLE = 4


def _gathered_table(argument: Any) -> str | None:
    """The table behind ``index_select(table, 0, rows)``, or None."""
    if not is_call(argument, aten.index_select.default):
        return None
    table = argument.args[0]
    return str(table.target) if isinstance(table, fx.Node) and table.op == "get_attr" else None


def is_indexed_by_row(gather: fx.Node) -> bool:
    """Whether ``index_select(table, 0, rows)`` reads the row of the timestep table, and not some index of the model."""
    if _gathered_table(gather) is None:
        return False
    visited: set[fx.Node] = set()
    queue: list[Any] = [gather.args[2]]
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in visited:
            continue
        visited.add(node)
        if is_call(node, ROW_OP):
            return True
        queue.extend(node.all_input_nodes)
    return False


def find_row_quantizers(graph_module: fx.GraphModule, nodes: Collection[fx.Node]) -> dict[fx.Node, tuple[str, str]]:
    """The quantize nodes with parameters per row of the table, in order, with the names of their two tables.

    Args:
        graph_module: A converted graph.
        nodes: Where they are looked for: the temporal block.
    """
    groups = {find_groups(graph_module, name) for name in (GROUPS, EACH_TIMESTEP)}
    quantizers = {}
    for node in graph_module.graph.nodes:
        if node in nodes and is_call(node, decomposed.quantize_per_channel.default):
            scale, zero = _gathered_table(node.args[1]), _gathered_table(node.args[2])
            gather = node.args[1]
            if scale and zero and isinstance(gather, fx.Node) and not groups.intersection(gather.all_input_nodes):
                quantizers[node] = (scale, zero)
    return quantizers


class _ParametersPerRow:
    """A hook of an evaluation that gives every row parameters of its own, in the place of those in the tables."""

    def __init__(self, quantizers: Collection[fx.Node]) -> None:
        self._quantizers = frozenset(quantizers)
        self._by_gather: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        """Quantize and dequantize with parameters from the range of what is quantized."""
        if node in self._quantizers:
            self._by_gather[node.args[1]] = _parameters(args[0], node)
        elif not is_call(node, decomposed.dequantize_per_channel.default) or node.args[1] not in self._by_gather:
            return value
        target: Any = node.target
        return target(args[0], *self._by_gather[node.args[1]], *args[3:])


def _parameters(x: Tensor, quantizer: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int64) of each row of ``x``, ``[K, ...]``."""
    low, high = x.float().flatten(1).aminmax(dim=1)
    quant_min, quant_max = quantizer.args[4:6]
    assert isinstance(quant_min, int)
    assert isinstance(quant_max, int)
    return asymmetric_parameters(low, high, quant_min, quant_max)


def evaluate_padded(
    graph_module: fx.GraphModule,
    nodes: Collection[fx.Node],
    outputs: Sequence[fx.Node],
    columns: Mapping[str, Tensor],
    new: Collection[fx.Node] = (),
) -> list[Tensor]:
    """Evaluate a time path with the last row repeated until their number is a multiple of :data:`BATCH_MULTIPLE`.

    Args:
        graph_module: The graph.
        nodes: The nodes that may be computed.
        outputs: The nodes whose values are returned.
        columns: By name of an input, its value in every row, ``[K, ...]``.
        new: The quantize nodes that give these rows parameters of their own; the others have those of the tables.

    Returns:
        One tensor per output, ``[K, ...]``; with ``r`` entries per row ``[K * r, ...]``.

    Raises:
        TimestepError: What a quantizer of ``new`` sees is NaN or infinite in a row.
    """
    count = len(next(iter(columns.values())))
    padding = -count % BATCH_MULTIPLE
    padded = {name: torch.cat([column, *[column[-1:]] * padding]) for name, column in columns.items()}
    quantized: list[Any] = [node.args[0] for node in new]
    if new:
        values = evaluate_temporal_nodes(
            graph_module, nodes, [*outputs, *quantized], padded, hook=_ParametersPerRow(new)
        )
    else:
        values = evaluate_temporal_nodes(graph_module, nodes, outputs, padded)
    results = [result[: len(result) // (count + padding) * count] for result in values]
    if problem := describe_non_finite(
        results[len(outputs) :], columns, [f"the input of {_first_reader(node)!r}" for node in new]
    ):
        msg = f"{problem}; check the scheduler"
        raise TimestepError(msg)
    return results[: len(outputs)]


def describe_non_finite(values: Sequence[Tensor], columns: Mapping[str, Tensor], subjects: Sequence[str]) -> str | None:
    """A sentence's beginning that names the first value, and its row, with NaN or infinite numbers; None without one.

    Args:
        values: Tensors ``[K, ...]``, or ``[K * r, ...]``.
        columns: By name of an input, its value in every row, ``[K]``.
        subjects: What each of the values is.
    """
    count = len(next(iter(columns.values())))
    for value, subject in zip(values, subjects, strict=True):
        bad = (~value.reshape(count, -1).isfinite()).any(dim=1).nonzero()
        if len(bad):
            place = ", ".join(f"{name} {float(column[int(bad[0])]):g}" for name, column in columns.items())
            return f"{subject} holds NaN or infinite values at {place}"
    return None


def _first_reader(quantizer: fx.Node) -> str:
    """The name of the first layer that reads what a quantizer rounds."""
    queue, visited = [quantizer], {quantizer}
    while queue:
        node = queue.pop(0)
        if is_weighted(node):
            return layer_name(node)
        new = [user for user in node.users if user not in visited]
        visited.update(new)
        queue.extend(new)
    return quantizer.name


@torch.no_grad()
def extend_rows(graph_module: fx.GraphModule, added: Tensor, timestep: str = "timestep") -> None:
    """Add rows to the tables of a converted graph, in place; the rows that were there stay as they are.

    The tables are replaced and never written to: a copy of the graph may share them. With timestep groups a new
    timestep joins the group of the nearest one that was there, the earlier row of two.

    Args:
        graph_module: A converted graph; one without a table is left alone.
        added: The timesteps to add, distinct and not in the table, float64 ``[K]``.
        timestep: Name of the timestep input.

    Raises:
        TimestepError: The block computes NaN or infinite values at one of them.
    """
    lookups = row_lookups(graph_module)
    if not lookups or len(added) == 0:
        return
    values = row_values(graph_module, lookups[0])
    rows = len(row_columns(graph_module)[timestep])
    block = find_temporal_block(graph_module, timestep)
    quantizers = find_row_quantizers(graph_module, set(block.nodes))
    nearest, _ = ValueSearch(values).nearest(added)
    for name in (GROUPS, EACH_TIMESTEP):
        if find_groups(graph_module, name) is not None:
            groups: Tensor = read_attribute(graph_module, name)
            _replace_table(graph_module, name, torch.cat([groups, groups[nearest]]))
    values_node = lookups[0].args[1]
    assert isinstance(values_node, fx.Node)
    _replace_table(graph_module, str(values_node.target), torch.cat([values, added]))
    # The timestep changes slowest, so its new rows stand behind all others.
    columns = {name: column[rows:] for name, column in row_columns(graph_module).items()}
    tables = {name for pair in quantizers.values() for name in pair}
    for name in tables:
        table = read_attribute(graph_module, name)
        _replace_table(graph_module, name, torch.cat([table, table[-1:].expand(len(columns[timestep]))]))
    inputs: list[Any] = [node.args[0] for node in quantizers]
    quantized = evaluate_padded(graph_module, block.nodes, inputs, columns, new=quantizers)
    for x, (node, names) in zip(quantized, quantizers.items(), strict=True):
        for name, parameters in zip(names, _parameters(x, node), strict=True):
            read_attribute(graph_module, name)[rows:] = parameters


def _replace_table(graph_module: fx.GraphModule, name: str, value: Tensor) -> None:
    """Put a longer table in the place of a buffer, and its shape on the nodes that read it."""
    setattr(graph_module, name, value)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.meta["val"] = node.meta["val"].new_empty(value.shape)
