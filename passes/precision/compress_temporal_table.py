"""Store the table of temporal features in fewer bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, read_attribute, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.timestep_row import ROW_OP

__all__ = ["CompressTemporalTable", "feature_columns", "find_feature_tables", "half_rows", "quantize_rows"]

aten = torch.ops.aten

#: Smallest scale of a row: float32's smallest normal number, so that rows of any size keep their digits.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
#: Exponents of the largest value of a feature that float16 holds with all its digits, and those of values far below it.
HALF_EXPONENTS = range(-3, 16)


def find_feature_tables(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The gathers of rows of temporal features, as ``TabulateTemporalBlock`` leaves them: float tables ``[K, C]``."""
    return [node for node in graph_module.graph.nodes if _is_feature_gather(node)]


def _is_feature_gather(node: fx.Node) -> bool:
    if not is_call(node, aten.index_select.default) or node.args[1] != 0:
        return False
    table, _, rows = node.args
    if not (isinstance(table, fx.Node) and table.op == "get_attr" and isinstance(rows, fx.Node)):
        return False
    source = rows.args[0] if is_call(rows, aten.reshape.default) else rows
    value = node_value(table)
    sliced = all(is_call(user, aten.slice.Tensor) and user.args[1] == 1 and len(user.args) == 4 for user in node.users)
    return is_call(source, ROW_OP) and sliced and value.ndim == 2 and value.dtype.is_floating_point


def quantize_rows(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One feature's rows in 8 bits, each row with parameters of its own.

    Args:
        table: ``[K, C]``, float: row ``k`` is the feature at timestep ``k``.

    Returns:
        Integers ``[K, C]`` (uint8), scales ``[K]`` (float32) and zero points ``[K]`` (uint8), with
        ``table ~ (integers - zero) * scale``; zero is representable exactly.
    """
    low, high = table.float().aminmax(dim=1)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    # In halves, because the width of float32's own range is infinite in float32; a row of zeros divides by 1.
    half = high / 2 - low / 2
    scale = torch.where(half > 0, (half / 127.5).clamp_min(SMALLEST_SCALE), 1.0)
    zero = (-low / scale).round().clamp(0, 255)
    integers = (table.float() / scale[:, None]).round() + zero[:, None]
    return integers.clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def half_rows(table: Tensor) -> tuple[Tensor, float]:
    """One feature's rows in float16, and the power of two that they are multiples of.

    Args:
        table: ``[K, C]``, float.

    Returns:
        Numbers ``[K, C]`` and the factor, 1 where float16 holds the rows as they are: ``table ~ numbers * factor``.
    """
    top = table.float().abs().max()
    exponent = int(torch.frexp(top).exponent)
    factor = 1.0 if not bool(top) or exponent in HALF_EXPONENTS else 2.0 ** min(max(exponent, -126), 127)
    return (table.float() / factor).half(), factor


class CompressTemporalTable(GraphPass):
    """Keep the rows of temporal features as float16, or as 8-bit integers with a scale per row and feature.

    Before::

        %picked = index_select[%temporal_features](0, %rows)
        %f = slice(%picked, 1, a, b)

    After, with ``"int8"``::

        %q, %s, %z = index_select[%temporal_features_integers | _scale | _zero_point](0, %rows)
        %f = mul(sub(to(slice(%q, 1, a, b), float32), %z[:, i, None]), %s[:, i, None])

    After, with ``"float16"``; the factors, a power of two for each feature, are left out where all are 1::

        %picked = mul(to(index_select[%temporal_features_half](0, %rows), float32), %temporal_features_factor)

    Legality: each row holds the features of one timestep, and nothing but the readers of the table sees how they are
    stored. Numerics change by half a step of ``(max - min) / 255`` of each row and feature, or by float16's
    rounding. The table shrinks to a quarter or a half. Source: the cached temporal features of TFMQ-DM's
    extension (arXiv 2407.19547), one set of parameters per timestep and embedding layer.
    Meta: the new nodes take the module stack of the nodes that they replace.

    Args:
        storage: ``"int8"`` or ``"float16"``.
    """

    id: ClassVar[str] = "tfmq::compress_temporal_table"
    numerics: ClassVar[Numerics] = Numerics.CHANGED

    def __init__(self, storage: str) -> None:
        super().__init__()
        if storage not in ("int8", "float16"):
            msg = f"{self.id}: storage={storage!r} is not supported; use 'int8' or 'float16'"
            raise ValueError(msg)
        self.storage = storage

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Rewrite every float32 table of features."""
        gathers = [node for node in find_feature_tables(graph_module) if node_value(node).dtype == torch.float32]
        for gather in gathers:
            if self.storage == "float16":
                _to_half(graph_module, gather)
            else:
                _to_integers(graph_module, gather)
        return bool(gathers)


def _table_and_rows(gather: fx.Node) -> tuple[fx.Node, fx.Node]:
    table, _, rows = gather.args
    assert isinstance(table, fx.Node) and isinstance(rows, fx.Node)
    return table, rows


def feature_columns(piece: fx.Node) -> tuple[int, int]:
    """The columns of the table that a slice takes: the feature's."""
    _, _, start, stop = piece.args
    assert isinstance(start, int) and isinstance(stop, int)
    return start, stop


def _to_half(graph_module: fx.GraphModule, gather: fx.Node) -> None:
    graph, (table, rows) = graph_module.graph, _table_and_rows(gather)
    values: Tensor = read_attribute(graph_module, str(table.target))
    halves, factors = torch.zeros(values.shape, dtype=torch.float16), torch.ones(values.shape[1])
    for piece in gather.users:
        columns = slice(*feature_columns(piece))
        halves[:, columns], factors[columns] = half_rows(values[:, columns])
    name = add_buffer(graph_module, f"{table.target}_half", halves)
    with graph.inserting_before(gather):
        half = insert_get_attr(graph_module, name, anchor=gather)
        picked = insert_call(graph, aten.index_select.default, (half, 0, rows), anchor=gather)
        restored = insert_call(graph, aten.to.dtype, (picked, torch.float32), anchor=gather)
        if bool((factors != 1).any()):
            name = add_buffer(graph_module, f"{table.target}_factor", factors)
            factor = insert_get_attr(graph_module, name, anchor=gather)
            restored = insert_call(graph, aten.mul.Tensor, (restored, factor), anchor=gather)
    replace_node(gather, restored)
    _drop(graph_module, table)


def _to_integers(graph_module: fx.GraphModule, gather: fx.Node) -> None:
    graph, (table, rows) = graph_module.graph, _table_and_rows(gather)
    values: Tensor = read_attribute(graph_module, str(table.target))
    pieces = list(gather.users)
    parts = [quantize_rows(values[:, slice(*feature_columns(piece))]) for piece in pieces]
    integers = torch.empty(values.shape, dtype=torch.uint8)
    for piece, (part, _, _) in zip(pieces, parts, strict=True):
        integers[:, slice(*feature_columns(piece))] = part
    stored = {
        "integers": integers,
        "scale": torch.stack([scale for _, scale, _ in parts], dim=1),
        "zero_point": torch.stack([zero for _, _, zero in parts], dim=1),
    }
    picked = []
    with graph.inserting_before(gather):
        for suffix, tensor in stored.items():
            name = add_buffer(graph_module, f"{table.target}_{suffix}", tensor)
            read = insert_get_attr(graph_module, name, anchor=gather)
            picked.append(insert_call(graph, aten.index_select.default, (read, 0, rows), anchor=gather))
        q, scale, zero = picked
        wide = insert_call(graph, aten.to.dtype, (zero, torch.float32), anchor=gather)
    for index, piece in enumerate(pieces):
        with graph.inserting_before(piece):
            sliced = insert_call(graph, aten.slice.Tensor, (q, *piece.args[1:]), anchor=piece)
            number = insert_call(graph, aten.to.dtype, (sliced, torch.float32), anchor=piece)
            centred = insert_call(graph, aten.sub.Tensor, (number, _column(graph, wide, index, piece)), anchor=piece)
            restored = insert_call(graph, aten.mul.Tensor, (centred, _column(graph, scale, index, piece)), anchor=piece)
        replace_node(piece, restored)
    graph.erase_node(gather)
    _drop(graph_module, table)


def _column(graph: fx.Graph, gathered: fx.Node, index: int, anchor: fx.Node) -> fx.Node:
    """Column ``index`` of gathered parameters ``[n, I]``, as ``[n, 1]``."""
    column = insert_call(graph, aten.select.int, (gathered, 1, index), anchor=anchor)
    return insert_call(graph, aten.unsqueeze.default, (column, -1), anchor=anchor)


def _drop(graph_module: fx.GraphModule, table: fx.Node) -> None:
    """Forget the float table."""
    if not table.users:
        graph_module.graph.erase_node(table)
        delattr(graph_module, str(table.target))
