"""What quantizes an activation to bytes: one pair of numbers, or the row of a table that belongs to each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.support.arguments import argument_list, argument_node
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["ByteQuantizer", "RowTable", "byte_quantizer", "dequantized_bytes", "row_table"]

aten = torch.ops.aten
RANGE = (0, 255, torch.uint8)


@dataclass(frozen=True)
class RowTable:
    """A table of quantizers, and the row of each item of the batch.

    Attributes:
        scales: The node of the buffer with the scales, float32 ``[G]``.
        zero_points: That of the zero points, int64 ``[G]``.
        rows: The node with each item's row, int64 ``[items]``.
    """

    scales: fx.Node
    zero_points: fx.Node
    rows: fx.Node

    def values(self) -> tuple[Tensor, Tensor]:
        """The scales and zero points."""
        owner = self.scales.graph.owning_module
        assert owner is not None
        scales: Tensor = read_attribute(owner, str(self.scales.target))
        zero_points: Tensor = read_attribute(owner, str(self.zero_points.target))
        return scales.detach(), zero_points.detach()


@dataclass(frozen=True)
class ByteQuantizer:
    """A node that quantizes to all of uint8.

    Attributes:
        node: The quantize node.
        one: Scale and zero point for all items, or None.
        table: Those of each item, or None.
    """

    node: fx.Node
    one: tuple[float, int] | None
    table: RowTable | None

    @property
    def operands(self) -> tuple[Any, ...]:
        """What a kernel takes of it: two numbers, or the three nodes of its table."""
        if self.table is not None:
            return self.table.scales, self.table.zero_points, self.table.rows
        assert self.one is not None
        return self.one

    @property
    def zero_points(self) -> list[int]:
        """The zero points that it has."""
        return [self.one[1]] if self.one is not None else self._table_values()[1].tolist()

    @property
    def scales(self) -> list[float]:
        """The scales that it has."""
        return [self.one[0]] if self.one is not None else self._table_values()[0].tolist()

    def _table_values(self) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        return self.table.values()


def byte_quantizer(node: Any) -> ByteQuantizer | None:
    """``node`` as what quantizes to all of uint8: by one pair of numbers, or by a row of a table for each item."""
    if is_call(node, decomposed.quantize_per_tensor.default) and node.args[3:] == RANGE:
        numbers: Any = node.args[1:3]
        # One outside stands for no byte, which a border would need.
        return ByteQuantizer(node, (float(numbers[0]), int(numbers[1])), None) if 0 <= numbers[1] <= 255 else None
    if not is_call(node, decomposed.quantize_per_channel.default) or node.args[3:] != (0, *RANGE):
        return None
    table = row_table(node)
    return None if table is None else ByteQuantizer(node, None, table)


def row_table(node: Any, integers: tuple[int, int, torch.dtype] = RANGE) -> RowTable | None:
    """The table of parameters that ``node`` quantizes to, or dequantizes, integers by, one row for each item.

    Args:
        node: Any argument of a node.
        integers: Smallest and largest integer, which zero points lie between, and their dtype.
    """
    by_channel = (decomposed.quantize_per_channel.default, decomposed.dequantize_per_channel.default)
    if not is_call(node, *by_channel) or node.args[3] != 0 or node.args[6] != integers[2]:
        return None
    scales, zero_points = (_gathered(node.args[position]) for position in (1, 2))
    if scales is None or zero_points is None or scales[1] is not zero_points[1]:
        return None
    table = RowTable(scales[0], zero_points[0], scales[1])
    scale, zero_point = table.values()
    fits = scale.dtype == torch.float32 and zero_point.dtype == torch.int64 and scale.shape == zero_point.shape
    fits = fits and bool((scale > 0).all()) and bool(scale.isfinite().all())
    return table if fits and bool(((zero_point >= 0) & (zero_point <= integers[1])).all()) else None


def dequantized_bytes(node: Any) -> ByteQuantizer | None:
    """The byte quantizer whose result ``node`` dequantizes by the same parameters."""
    if is_call(node, decomposed.dequantize_per_tensor.default, decomposed.dequantize_per_channel.default):
        source: Any = node.args[0]
        found = byte_quantizer(source)
        return found if found is not None and node.args[1:] == source.args[1:] else None
    return None


def _gathered(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The buffer that ``node`` gathers rows of, and the row of each item; None where it is something else."""
    if not is_call(node, aten.index_select.default) or node.args[1] != 0:
        return None
    table, rows = argument_node(node, 0), _repeated_rows(argument_node(node, 2))
    stored = table.op == "get_attr" and isinstance(node_value(table), Tensor) and node_value(table).ndim == 1
    return (table, rows) if stored and rows is not None else None


def _repeated_rows(index: fx.Node) -> fx.Node | None:
    """What ``index`` repeats for the entries of each item, one behind the other; None where that is not certain."""
    if is_call(index, aten.reshape.default) and list(argument_list(index, 1)) == [-1]:
        repeated = argument_node(index, 0)
        if not is_call(repeated, aten.expand.default) or len(argument_list(repeated, 1)) != 2:
            return None
        column = argument_node(repeated, 0)
        if not is_call(column, aten.unsqueeze.default) or column.args[1] != 1:
            return None
        return _repeated_rows(argument_node(column, 0))
    if is_call(index, aten.expand.default):
        source = argument_node(index, 0)
        return _repeated_rows(source) if list(node_value(source).shape) == [1] else None
    value = node_value(index)
    return index if isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int64 else None
