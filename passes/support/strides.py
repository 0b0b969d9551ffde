"""What follows a replaced node sees the memory layout that it was traced with, or one that it takes as well."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import SymInt, Tensor

__all__ = ["axis_order", "layout", "refuses"]

aten = torch.ops.aten

#: Operators that refuse layouts when they run, but not when a fake tensor is put through them.
ONLY_DENSE = (aten.native_group_norm.default,)


def layout(value: Tensor) -> tuple[str, ...]:
    """The strides of ``value`` as text, which asks symbolic sizes nothing; those of axes of size one do not matter."""
    pairs = zip(value.shape, value.stride(), strict=True)
    return tuple("" if isinstance(size, int) and size == 1 else _written(stride) for size, stride in pairs)


def axis_order(value: Tensor) -> list[int]:
    """The axes of ``value`` from the outermost in memory to the innermost."""
    strides = [stride.node.hint if isinstance(stride, SymInt) else stride for stride in value.stride()]
    return sorted(range(value.ndim), key=lambda axis: -strides[axis])


def refuses(target: Any, values: Collection[Any]) -> bool:
    """Whether the kernel of ``target`` will not take ``values``, though their fake tensors pass."""
    if target not in ONLY_DENSE:
        return False
    return any(isinstance(value, Tensor) and value.ndim > 1 and not _is_dense_image(value) for value in values)


def _written(stride: Any) -> str:
    return str(stride.node.expr) if isinstance(stride, SymInt) else str(stride)


def _is_dense_image(value: Tensor) -> bool:
    """Whether ``value`` is contiguous, or an image or a video with its channels last."""
    orders = [list(range(value.ndim)), [0, *range(2, value.ndim), 1]][: 2 if value.ndim in (4, 5) else 1]
    names = [axis for axis, size in enumerate(value.shape) if not (isinstance(size, int) and size == 1)]
    actual = [axis for axis in axis_order(value) if axis in names]
    return any(actual == [axis for axis in order if axis in names] for order in orders)
