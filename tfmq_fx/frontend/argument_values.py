"""The value of one argument of a call against what was captured: constants, numbers, and tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import InputError
from tfmq_fx.frontend.interface import ConstantInput, TensorInput
from tfmq_fx.frontend.tensors import check_finite, check_memory, contiguous, described

__all__ = ["bind_tensor", "check_constant", "equal_scalars"]


def equal_scalars(value: Any, other: Any) -> bool:
    """Whether two plain values are equal; True is not 1."""
    if isinstance(value, Tensor) and value.ndim == 0 and isinstance(other, (int, float)):
        value = value.item()
    if isinstance(value, bool) or isinstance(other, bool) or value is None or other is None:
        return value is other
    return isinstance(value, (int, float, str)) and isinstance(other, (int, float, str)) and value == other


def check_constant(expected: ConstantInput, value: Any) -> None:
    """Raise where an argument differs from the constant that was captured.

    Raises:
        InputError: It does.
    """
    if not equal_scalars(value, expected.value):
        msg = (
            f"argument {expected.name!r} is {described(value)}, but this program was captured with {expected.value!r}, "
            "which is part of it; capture it again with what you pass"
        )
        raise InputError(msg)


def bind_tensor(expected: TensorInput, value: Any, batch: int | None) -> Tensor:
    """A tensor as it was captured, but for its memory format.

    Args:
        expected: What was captured.
        value: The argument: a tensor, or a number where the tensor is 0-dim.
        batch: The batch size; None where it is fixed.

    Raises:
        InputError: Its shape, dtype, device or values do not fit.
    """
    if not expected.sizes and isinstance(value, (int, float)):
        value = _as_0dim_tensor(expected, value)
    shape = expected.shape(batch)
    if not isinstance(value, Tensor) or list(value.shape) != shape:
        rest = "" if batch is None else f" (here the batch is {batch})"
        msg = (
            f"argument {expected.name!r} is {described(value)}, but this program was captured with {expected}{rest}; "
            "capture it again for this shape"
        )
        raise InputError(msg)
    if value.dtype != expected.dtype and _is_narrower_integer(value.dtype, expected.dtype):
        value = value.to(expected.dtype)
    if value.dtype != expected.dtype or value.device.type != expected.device or value.layout is not torch.strided:
        msg = (
            f"argument {expected.name!r} is {described(value)}, but this program was captured with {expected} on "
            f"{expected.device}; convert it before the call"
        )
        raise InputError(msg)
    check_memory(value, expected.name)
    check_finite(value, expected.name, mask=expected.mask)
    return contiguous(value)


def _is_narrower_integer(dtype: torch.dtype, captured: torch.dtype) -> bool:
    """Whether every integer of one dtype is one of the other."""
    narrower: Collection[torch.dtype] = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return captured is torch.int64 and dtype in narrower


def _as_0dim_tensor(expected: TensorInput, value: int | float) -> Any:
    """A number for a 0-dim input; itself, which is refused, where the input's dtype cannot hold it."""
    boolean = isinstance(value, bool)
    if boolean is not (expected.dtype is torch.bool):
        return value
    integral = boolean or float(value).is_integer()
    return torch.tensor(value, dtype=expected.dtype) if integral or expected.dtype.is_floating_point else value
