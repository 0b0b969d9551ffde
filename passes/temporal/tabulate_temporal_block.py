"""Evaluate the temporal block once per timestep and replace it by a table."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx.passes.analysis import TemporalBlock, evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.passes.analysis.dependence import reads_as_parameter
from tfmq_fx.passes.analysis.layer_names import layer_name
from tfmq_fx.passes.analysis.table_row import require_row, row_columns
from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.item_rows import rows_of_items
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, redirect_users
from tfmq_fx.passes.support.predicates import is_weighted, node_value

__all__ = ["LAYER", "TabulateTemporalBlock", "layer_behind", "shaped_feature"]

aten = torch.ops.aten
#: Largest table that is still worth its memory: a thousand timesteps of Stable Diffusion take 80 MB.
MOST_BYTES = 2**30
#: ``meta`` key of a feature's slice of the table: the name of the layer that the feature came from.
LAYER = "tfmq_fx.feature_layer"


class TabulateTemporalBlock(GraphPass):
    """Replace every temporal feature by a read of a table with one row per timestep.

    Before::

        %e = linear(silu(%h), %w, %b)      %f = unsqueeze(%e, -1)      %y = add(%conv, %f)

    After::

        %picked = index_select[%temporal_features](0, %row)
        %f = view(slice(%picked, 1, a, b), [N, C, 1, 1])               %y = add(%conv, %f)

    Legality: the block is a function of the timestep alone and the timesteps are finitely many, so its
    values can be computed beforehand; row ``k`` must depend on timestep ``k`` alone, which is checked by
    evaluating the table backwards too. Numerics are preserved up to the batch size's effect on the
    order of float sums. All features of one dtype share one table and one gather.
    Meta: the new nodes take the module stack of the feature that they replace; ``meta["tfmq_fx.feature_layer"]`` of
    its slice of the table names the layer behind it.

    Args:
        timestep: Name of the timestep placeholder.
    """

    id: ClassVar[str] = "tfmq::tabulate_temporal_block"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def __init__(self, *, timestep: str = "timestep") -> None:
        super().__init__()
        self.timestep = timestep

    def requires(self, graph_module: fx.GraphModule) -> None:
        """A row of the timestep table."""
        super().requires(graph_module)
        require_row(graph_module, self.id)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Tabulate the frontier, then erase what only led to it."""
        row = require_row(graph_module, self.id)
        block = find_temporal_block(graph_module, self.timestep)
        features = [node for node in _read_outside(block) if node is not row]
        if not features:
            return False
        tables = self._evaluate(graph_module, block, features, row_columns(graph_module))
        graph = graph_module.graph
        for dtype in dict.fromkeys(table.dtype for table in tables):
            group = [(node, table) for node, table in zip(features, tables, strict=True) if table.dtype == dtype]
            _replace_group(graph_module, row, group)
        for node in reversed(block.nodes):
            if not node.users and node is not row:
                graph.erase_node(node)
        return True

    def _evaluate(self, graph_module: fx.GraphModule, block: TemporalBlock, features: list[fx.Node],
                  columns: dict[str, Tensor]) -> list[Tensor]:  # fmt: skip
        reversed_columns = {name: column.flip(0) for name, column in columns.items()}
        count = len(columns[self.timestep])
        one = {name: column[:1] for name, column in columns.items()}
        first = evaluate_temporal_nodes(graph_module, block.nodes, features, one)
        size = count * sum(row.numel() * row.element_size() for row in first)
        if size > MOST_BYTES:
            combinations = " x ".join(f"{len(set(column.tolist()))} of {name!r}" for name, column in columns.items())
            msg = (
                f"{self.id}: a table of all temporal features ({combinations}) would take {size / 2**30:.1f} GiB; "
                "name fewer values in finite=, or keep the block in the graph (lower(..., tabulate=False))"
            )
            raise PassError(msg)
        tables = evaluate_temporal_nodes(graph_module, block.nodes, features, columns)
        for node, table in zip(features, tables, strict=True):
            self._require_finite(node, table, columns)
        backwards = evaluate_temporal_nodes(graph_module, block.nodes, features, reversed_columns)
        for node, table, back in zip(features, tables, backwards, strict=True):
            if table.shape[0] != count or not torch.allclose(table, back.flip(0), rtol=1e-4, atol=1e-5):
                msg = (
                    f"{self.id}: the rows of temporal feature {node.name!r} do not each depend on their own "
                    "timestep alone; keep the block in the graph instead (tabulate=False)"
                )
                raise PassError(msg)
        return tables

    def _require_finite(self, feature: fx.Node, table: Tensor, columns: dict[str, Tensor]) -> None:
        """Refuse rows that would make a result of NaN at their timestep; the error names both."""
        bad = (~table.reshape(len(table), -1).isfinite()).any(dim=1).nonzero()
        if len(bad):
            row = int(bad[0])
            place = ", ".join(f"{name} {float(column[row]):g}" for name, column in columns.items())
            msg = (
                f"{self.id}: the temporal feature of {layer_behind(feature)!r} holds NaN or infinite values at "
                f"{place}; leave that value out of the table, or mend the model"
            )
            raise PassError(msg)


def _read_outside(block: TemporalBlock) -> list[fx.Node]:
    """The features, and what is read outside for its shape alone: it would keep the block's linears alive."""
    tensors = [node for node in block.nodes if node.op != "get_attr" and isinstance(node_value(node), Tensor)]
    return [n for n in tensors if any(user not in block and not reads_as_parameter(user, n) for user in n.users)]


def _replace_group(graph_module: fx.GraphModule, row: fx.Node, group: list[tuple[fx.Node, Tensor]]) -> None:
    """Replace features of one dtype by slices of one gathered table row."""
    graph = graph_module.graph
    joined = torch.cat([table.reshape(table.shape[0], -1) for _, table in group], dim=1).contiguous()
    name = add_buffer(graph_module, "temporal_features", joined)
    anchor = group[0][0]
    with graph.inserting_after(row):
        table_node = insert_get_attr(graph_module, name, anchor=anchor)
    with graph.inserting_after(table_node):
        rows = row
        if node_value(row).ndim == 0:
            rows = insert_call(graph, aten.reshape.default, (row, [-1]), anchor=anchor)
    with graph.inserting_before(rows.next if rows is not row else table_node.next):
        picked = insert_call(graph, aten.index_select.default, (table_node, 0, rows), anchor=anchor)
        start = 0
        for node, table in group:
            width = table[0].numel()
            piece = insert_call(graph, aten.slice.Tensor, (picked, 1, start, start + width), anchor=node)
            piece.meta[LAYER] = layer_behind(node)
            redirect_users(node, shaped_feature(graph, piece, rows, node))
            start += width


def layer_behind(feature: fx.Node) -> str:
    """The name of the last layer on the way to a feature; the feature's own where there is none."""
    seen, queue = {feature}, [feature]
    while queue:
        node = queue.pop(0)
        if is_weighted(node):
            return layer_name(node)
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return feature.name


def shaped_feature(graph: fx.Graph, piece: fx.Node, rows: fx.Node, feature: fx.Node) -> fx.Node:
    """View a gathered slice ``[n, width]`` in the feature's own shape; ``n`` is the batch or one."""
    shape = node_value(feature).shape
    trailing = [int(size) for size in shape[1:]]
    if len(shape) and node_value(rows).shape[0] == shape[0]:
        return insert_call(graph, aten.reshape.default, (piece, [-1, *trailing]), anchor=feature)
    if any(isinstance(size, SymInt) for size in shape):
        viewed = insert_call(graph, aten.reshape.default, (piece, [-1, *trailing]), anchor=feature)
        size: Any = rows_of_items(graph, rows, node_value(feature), anchor=feature)
        batch = insert_call(graph, aten.sym_size.int, (size, 0), anchor=feature)
        return insert_call(graph, aten.expand.default, (viewed, [batch, *trailing]), anchor=feature)
    if node_value(rows).shape[0] != 1:
        # Of a 0-dim timestep alone, where the rows follow a further input of one value per item: any row will do.
        piece = insert_call(graph, aten.slice.Tensor, (piece, 0, 0, 1), anchor=feature)
    return insert_call(graph, aten.reshape.default, (piece, [int(size) for size in shape]), anchor=feature)
