"""The sizes of a captured tensor: numbers, and multiples of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx.errors import CaptureError
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["BatchSize", "Size", "batch_axis", "check_one_symbol", "sizes_of", "text_of_sizes"]


@dataclass(frozen=True)
class BatchSize:
    """A size that grows with the batch: ``times`` entries for each of its items."""

    times: int = 1


Size = int | BatchSize


def sizes_of(value: Tensor) -> tuple[Size, ...]:
    """The sizes of a fake tensor.

    Raises:
        CaptureError: One of them depends on the batch otherwise than as a multiple of it.
    """
    return tuple(_size(size) for size in value.shape)


def _size(size: int | SymInt) -> Size:
    if not isinstance(size, SymInt):
        return int(size)
    expression = size.node.expr
    (symbol,) = expression.free_symbols
    one, two, three = (int(expression.subs({symbol: number})) for number in (1, 2, 3))
    if one < 1 or (two, three) != (2 * one, 3 * one):
        msg = f"a size of the program is {expression}, which is no multiple of the batch: export it with one batch Dim"
        raise CaptureError(msg)
    return BatchSize(one)


def check_one_symbol(graph: fx.Graph) -> None:
    """Raise unless the inputs have one symbolic size at most: a program serves every batch, and no other size.

    Raises:
        CaptureError: Names the inputs and sizes.
    """
    symbols: dict[str, str] = {}
    for node in graph.nodes:
        value = node_value(node) if node.op == "placeholder" else None
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, SymInt):
                for symbol in size.node.expr.free_symbols:
                    symbols.setdefault(str(symbol), f"axis {axis} of {node.target!r}")
    if len(symbols) > 1:
        msg = (
            f"the program has {len(symbols)} dynamic sizes ({', '.join(symbols.values())}), and only the batch may be "
            "dynamic: export it with one Dim, on the batch axes alone"
        )
        raise CaptureError(msg)


def batch_axis(sizes: Sequence[Size]) -> int | None:
    """The first axis that grows with the batch, or None."""
    return next((axis for axis, size in enumerate(sizes) if isinstance(size, BatchSize)), None)


def text_of_sizes(sizes: Sequence[Size], dtype: torch.dtype) -> str:
    """Sizes and dtype as messages say them: ``[batch, 4, 64, 64] float32``."""
    parts = [str(s) if isinstance(s, int) else "batch" if s.times == 1 else f"{s.times} * batch" for s in sizes]
    return f"[{', '.join(parts)}] {str(dtype).removeprefix('torch.')}"
