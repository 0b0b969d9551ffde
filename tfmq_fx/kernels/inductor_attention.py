"""Attention on our integer kernel, as a call of the C++ beside this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tfmq_fx._torch import inductor as inductor_ir
from tfmq_fx.kernels.inductor_calls import Number, Quantizer, kernel_call, numbers

__all__ = ["attention", "attention_rows"]


def _broadcast(sizes: Sequence[Any]) -> Any:
    """The one of ``sizes``, of operands that were checked, that is not 1."""
    return next((size for size in sizes if size != 1), sizes[0])


def _strides(value: Any, broadcast: Sequence[Any]) -> list[Any]:
    """The first three strides of ``value``: 0 for the batch and the heads where it has one for all ``wanted``."""
    size, strides = value.get_size(), value.get_stride()
    return [*(0 if n == 1 and m != 1 else s for n, m, s in zip(size, broadcast, strides, strict=False)), strides[2]]


def attention(
    query: Any,
    key: Any,
    value: Any,
    factor: float,
    scales: Sequence[float],
    zero_points: Sequence[int],
    deferred: bool = False,
) -> Any:
    """The lowering of ``integer_attention``."""
    zeros = (zero_points[0], zero_points[1], 0, zero_points[2])

    def shared(names: Sequence[str], images: Any, number: Number) -> str:
        points = ", ".join(f"int64_t({number(zero)})" for zero in zeros)
        return f"tfmq::SharedAttentionQuantizers{{{{{numbers(scales, number)}}}, {{{points}}}}}"

    return _any_attention((query, key, value), factor, (), shared, deferred)


def attention_rows(
    query: Any, key: Any, value: Any, factor: float, scales: Any, zero_points: Any, rows: Any, deferred: bool = False
) -> Any:
    """The lowering of ``integer_attention.rows``."""
    table = Quantizer(None, (scales, zero_points, rows))

    def by_rows(names: Sequence[str], images: Any, number: Number) -> str:
        return f"tfmq::AttentionQuantizers{{{table.cpp(names, images, number)}}}"

    return _any_attention((query, key, value), factor, table.inputs, by_rows, deferred)


def _any_attention(
    inputs: Sequence[Any],
    factor: float,
    table: Sequence[Any],
    quantizers: Callable[[Sequence[str], Any, Number], str],
    deferred: bool,
) -> Any:
    operands = [inductor_ir.contiguous_rows(x) for x in inputs]
    sizes = [x.get_size() for x in operands]
    batch, key_batch = (_broadcast([size[0] for size in group]) for group in (sizes, sizes[1:]))
    heads, key_heads = (max(int(size[1]) for size in group) for group in (sizes, sizes[1:]))
    length, depth, keys = sizes[0][2], sizes[0][3], sizes[1][2]
    repeated = ((batch, heads), (key_batch, key_heads), (key_batch, key_heads))

    def statement(names: Sequence[str], output: str, number: Number) -> str:
        strides = ", ".join(
            f"{{{numbers(_strides(x, broadcast), number)}}}" for x, broadcast in zip(operands, repeated, strict=True)
        )
        counts = numbers((batch, heads, length, keys, depth, key_batch, key_heads), number)
        shape = f"tfmq::AttentionShape{{{counts}, {strides}}}"
        by, order = quantizers(names, batch, number), "true" if deferred else "false"
        arguments = ", ".join((*names[:3], output, shape, number(factor), by, order))
        return f"tfmq::integer_attention({arguments});"

    return kernel_call(
        "attention.h", (batch, length, heads, depth), operands[0].get_dtype(), [*operands, *table], statement
    )
