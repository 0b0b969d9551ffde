"""Symbolic sizes as numbers, once the batch is known."""

from __future__ import annotations

from typing import Any

from torch import SymInt

__all__ = ["concrete_size", "entries_per_item", "is_same_size"]


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are certainly the same, without deciding anything about a symbolic one."""
    if isinstance(one, SymInt) and isinstance(other, SymInt):
        return bool(one.node.expr == other.node.expr)
    return isinstance(one, int) and isinstance(other, int) and one == other


def concrete_size(value: Any, batch: int) -> Any:
    """Turn a symbolic size into an int, every free symbol standing for the batch; anything else passes through."""
    if not isinstance(value, SymInt):
        return value
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def entries_per_item(size: Any) -> int | None:
    """How many entries an axis of this size has for each item of the batch; None when it does not grow with it."""
    if not isinstance(size, SymInt):
        return None
    entries = int(concrete_size(size, 1))
    return entries if entries > 0 and concrete_size(size, 3) == 3 * entries else None
