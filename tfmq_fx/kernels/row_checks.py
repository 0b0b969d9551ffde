"""What the overloads ``.rows`` take: the arguments of their operators, a table of quantizers and the row of each item.

The values of the table are checked where a pass makes one: here they need not be known yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tfmq_fx.errors import LoweringError
from tfmq_fx.kernels.checks import check_attention, check_conv, check_image, check_pointwise

__all__ = ["check_attention_rows", "check_conv_rows", "check_image_rows", "check_pointwise_rows"]

#: Scales and zero points of a table, float32 and int64, and the row of each item, int64.
Table = tuple[Tensor, Tensor, Tensor]
#: Scale, sums and bias of a layer's output channels.
Constants = tuple[Tensor, Tensor, Tensor]


def _require(holds: bool, operator: str, problem: str) -> None:
    if not holds:
        msg = f"tfmq::{operator}.rows cannot take its arguments: {problem}"
        raise LoweringError(msg)


def _check_table(operator: str, table: Table, columns: Sequence[int], images: int | torch.SymInt) -> None:
    scales, zero_points, rows = table
    for name, value, dtype in (("scales", scales, torch.float32), ("zero points", zero_points, torch.int64)):
        fits = value.dtype == dtype and value.ndim == 1 + len(columns) and list(value.shape[1:]) == list(columns)
        fits = fits and value.shape[0] >= 1 and value.is_contiguous()
        expected = f"{dtype} {['rows', *columns]}"
        _require(fits, operator, f"the {name} are {value.dtype} {list(value.shape)}, not {expected}, contiguous")
    _require(scales.shape == zero_points.shape, operator, "it has scales and zero points of unlike numbers of rows")
    fits = rows.dtype == torch.int64 and rows.ndim == 1 and not statically_known_true(rows.shape[0] == 0)
    fits = fits and not statically_known_true(images % rows.shape[0] != 0)
    _require(
        fits, operator, f"the rows are {rows.dtype} {list(rows.shape)} for {images} images, not int64 of a divisor"
    )


def check_conv_rows(
    x: Tensor,
    weight: Tensor,
    constants: Constants,
    residual: Tensor | None,
    table: Table,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Raise LoweringError for arguments of ``integer_conv.rows`` that its kernel would read or write wrongly."""
    scale, sums, bias = constants
    check_conv(x, weight, scale, bias, residual, kernel, stride, dtype)
    fits = sums.dtype == torch.int32 and sums.shape == scale.shape
    _require(fits, "integer_conv", f"the sums are {sums.dtype} {list(sums.shape)}, not int32 {list(scale.shape)}")
    _check_table("integer_conv", table, (), x.shape[0])


def check_image_rows(
    operator: str, x: Sequence[Tensor], enlarge: int, table: Table, padding: Sequence[int], factors: Tensor | None
) -> None:
    """Raise LoweringError for what scales, quantizes, enlarges and pads ``x`` where a kernel would do it wrongly."""
    check_image(operator, x, enlarge, 1.0, 0, padding, factors)
    _check_table(operator, table, (), x[0].shape[0])


def check_pointwise_rows(
    x: Tensor,
    weight: Tensor,
    constants: Constants,
    residual: Tensor | None,
    table: Table,
    dtype: torch.dtype,
    factors: Tensor | None,
) -> None:
    """Raise LoweringError for arguments of ``integer_pointwise_conv.rows`` that its kernel would take wrongly."""
    check_pointwise(x, weight, constants, residual, 1.0, 0, dtype, factors)
    _check_table("integer_pointwise_conv", table, (), x.shape[0])


def check_attention_rows(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, zero_points: Tensor, rows: Tensor, deferred: bool
) -> None:
    """Raise LoweringError for arguments of ``integer_attention.rows`` that its kernel would read or write wrongly."""
    check_attention(query, key, value, (1.0,) * 4, (0,) * 3, deferred)
    batch = next((x.shape[0] for x in (query, key, value) if not statically_known_true(x.shape[0] == 1)), 1)
    _check_table("integer_attention", (scales, zero_points, rows), (4,), batch)
