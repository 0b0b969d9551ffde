"""The timestep of a call, in the shape and dtype that a program was captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import InputError
from tfmq_fx.frontend.interface import TensorInput
from tfmq_fx.frontend.tensors import contiguous, described

__all__ = ["bind_timestep"]


def bind_timestep(expected: TensorInput, value: Any, batch: int | None) -> Tensor:
    """A timestep, given as a number, 0-dim, ``[1]`` or one per item, as it was captured.

    Args:
        expected: What was captured.
        value: The timestep.
        batch: The batch size; None where it is fixed.

    Raises:
        InputError: It is no number, not finite, fractional where integers were captured, has another number of values
            than the batch, or several where one was captured.
    """
    tensor = _as_tensor(expected, value)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        msg = f"argument {expected.name!r} holds NaN or infinite values; fix where it comes from"
        raise InputError(msg)
    floats = tensor.is_floating_point() and not expected.dtype.is_floating_point
    if floats and not torch.equal(tensor, tensor.round()):
        first = tensor[tensor != tensor.round()].flatten()[0].item() if tensor.ndim else tensor.item()
        msg = (
            f"timestep {first:g} is fractional, but the program was captured with {expected.dtype} timesteps; "
            "capture it with a float timestep"
        )
        raise InputError(msg)
    tensor = tensor.to(expected.dtype)
    shape = expected.shape(batch)
    if not shape:
        if tensor.numel() > 1 and not bool((tensor == tensor.flatten()[0]).all()):
            msg = "this program was captured with a 0-dim timestep and cannot mix timesteps; capture it with [N]"
            raise InputError(msg)
        return tensor.flatten()[0].clone()
    if list(tensor.shape) == shape:
        return contiguous(tensor)
    if tensor.numel() == 1:
        return tensor.reshape([1] * len(shape)).expand(shape).contiguous()
    if tensor.ndim == 1 and len(tensor) == shape[0]:
        return tensor.reshape([-1] + [1] * (len(shape) - 1)).expand(shape).contiguous()
    msg = f"argument {expected.name!r} is {described(value)}, but this program takes one timestep, or {shape} of them"
    raise InputError(msg)


def _as_tensor(expected: TensorInput, value: Any) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    if not isinstance(value, Tensor) or value.numel() == 0 or value.dtype is torch.bool or value.is_complex():
        msg = f"argument {expected.name!r} is {described(value)}, but the program takes a number or a tensor of them"
        raise InputError(msg)
    if value.device.type != expected.device or value.layout is not torch.strided:
        msg = f"argument {expected.name!r} is {described(value)}, but this program runs on {expected.device}; move it"
        raise InputError(msg)
    return value.detach()
