"""Tensors at the edge of a program: contiguous, finite, and described in messages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tfmq_fx._torch.tensors import has_memory
from tfmq_fx.errors import InputError

__all__ = ["check_finite", "check_memory", "contiguous", "described"]


def contiguous(value: Tensor) -> Tensor:
    """``value`` in plain memory: contiguous, with the strides of its shape, without gradient, conjugation or negation.

    ``Tensor.contiguous`` returns a tensor as it is where an axis of size 1 has any stride; views as bytes and compiled
    code take those of the shape alone.
    """
    plain = value.detach().contiguous()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    strides = _strides(plain.shape)
    return plain if plain.stride() == strides else plain.as_strided(plain.shape, strides)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def check_memory(value: Tensor, name: str) -> None:
    """Raise where a tensor only stands for another one, as inside ``torch.func`` transforms and while tracing.

    Raises:
        InputError: It has no memory that compiled code could read.
    """
    if not has_memory(value):
        msg = f"argument {name!r} has no values of its own (a torch.func transform, or tracing): call outside of it"
        raise InputError(msg)


def check_finite(value: Tensor, name: str, *, mask: bool = False) -> None:
    """Raise where a floating-point input holds NaN or infinite values; -inf is normal in an additive mask.

    Inside, activations are bytes: NaN would become a number there, and a plausible image come out.

    Raises:
        InputError: It does.
    """
    if not value.is_floating_point() or value.numel() == 0:
        return
    # One reduction; where finite values add up beyond the dtype, each is looked at.
    total = float(value.max() if mask else value.sum(dtype=torch.promote_types(value.dtype, torch.float32)))
    finite = total < math.inf if mask else math.isfinite(total) or bool(torch.isfinite(value).all())
    if not finite:
        msg = f"argument {name!r} holds NaN or infinite values; fix where it comes from"
        raise InputError(msg)


def described(value: Any) -> str:
    """A value as messages say it: shape and dtype of a tensor, a plain value itself, the type of anything else."""
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device.type}"
        layout = "" if value.layout is torch.strided else f", {str(value.layout).removeprefix('torch.')}"
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{device}{layout}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:37]}...")
    return f"a {type(value).__name__}"
