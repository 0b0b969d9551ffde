"""Calibration batches: the model's own inputs, in any of the forms that users have them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import CalibrationError, InputError
from tfmq_fx.frontend.binding import Call, bind, named_arguments
from tfmq_fx.frontend.interface import Interface

__all__ = ["Batch", "as_batches", "batch_arguments", "bind_batch", "calls_by_timestep", "timestep_of"]

#: The model's own inputs: positional, by name, or a single tensor.
Batch = Sequence[Any] | Mapping[str, Any] | Tensor


def as_batches(batches: Any) -> Iterable[Batch]:
    """``batches`` as they are given.

    Raises:
        CalibrationError: They cannot be iterated, or are one batch and not several.
    """
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        what = "a single batch" if isinstance(batches, (Tensor, Mapping)) else f"a {type(batches).__name__}"
        msg = f"batches= is {what}: pass a list of batches of the model's own inputs, such as [(sample, timestep)]"
        raise CalibrationError(msg)
    return batches


def batch_arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as ``(args, kwargs)``.

    Raises:
        CalibrationError: It is none.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(batch), {}
    msg = f"a calibration batch is a {type(batch).__name__}; pass a tuple of inputs, a dictionary by name, or a tensor"
    raise CalibrationError(msg)


def bind_batch(interface: Interface, index: int, batch: Batch, timestep: str) -> Call:
    """Bind a calibration batch.

    Args:
        interface: What the model was captured with.
        index: Number of the batch, for messages.
        batch: The batch.
        timestep: Name of the timestep input.

    Raises:
        CalibrationError: It does not fit; the message names the batch and the argument.
    """
    args, kwargs = batch_arguments(batch)
    try:
        return bind(interface, args, kwargs, timestep)
    except InputError as error:
        msg = f"calibration batch {index} does not fit the captured model: {error}"
        raise CalibrationError(msg) from error


def calls_by_timestep(call: Call, timestep: str) -> list[tuple[Tensor | None, Call]]:
    """Cut a call into calls of one timestep each, in the order in which these occur.

    Args:
        call: The call.
        timestep: Name of the timestep input.

    Returns:
        The timesteps of the items of each call, with the call; None where there is no such input. A call that cannot be
        cut, because its batch is fixed or an input has several entries per item, is one call.
    """
    index = call.interface.find(timestep)
    values = None if index is None else call.leaves[index]
    if not isinstance(values, Tensor):
        return [(None, call)]
    distinct = list(dict.fromkeys(values.reshape(-1).tolist()))
    if len(distinct) < 2 or call.batch is None or values.shape != (call.batch,):
        return [(values, call)]
    calls: list[tuple[Tensor | None, Call]] = []
    for value in distinct:
        items = (values == value).nonzero()[:, 0]
        try:
            calls.append((values[items], call.take(items)))
        except InputError:
            return [(values, call)]
    return calls


def timestep_of(interface: Interface, batch: Batch, timestep: str) -> Tensor | None:
    """The timestep of a batch as it was given; None where the batch does not fit, which binding it says."""
    try:
        value = named_arguments(interface, *batch_arguments(batch)).get(timestep)
    except (CalibrationError, InputError):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=torch.float64)
    return value.detach().cpu() if isinstance(value, Tensor) and not value.is_meta else None
