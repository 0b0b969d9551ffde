"""Calibration items that are kept back: neither ranges nor roundings see them, and errors are measured on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.errors import CalibrationError, InputError
from tfmq_fx.frontend.batches import Batch, bind_batch, calls_by_timestep
from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.passes.support.timestep_values import ValueSearch
from tfmq_fx.quantization.probes import Probe

__all__ = ["MOST_ITEMS", "hold_back"]

#: Items that are kept back at most, one of a timestep: the search runs the model some hundred times on each.
MOST_ITEMS = 50


def hold_back(
    program: fx.GraphModule, batches: Iterable[Batch], timestep: str, timesteps: Tensor | None
) -> tuple[list[Batch], list[Probe]]:
    """Take one item of every timestep out of the calibration batches.

    Of a timestep it is the last item of its first batch, unless that is its only one. Where there are more timesteps
    than :data:`MOST_ITEMS`, those are taken that lie evenly among them. What cannot be cut, and a model without a
    timestep, gives its last batch.

    Args:
        program: The captured graph.
        batches: The calibration batches.
        timestep: Name of the timestep input.
        timesteps: The schedule, ``[K]``; items at others are left to calibration.

    Returns:
        The batches without these items, and the items, without results.

    Raises:
        CalibrationError: Nothing can be kept back, for there are too few items.
    """
    calls: list[tuple[Tensor | None, Call]] = []
    for index, batch in enumerate(batches):
        calls += calls_by_timestep(bind_batch(interface_of(program), index, batch, timestep), timestep)
    known = None if timesteps is None else ValueSearch(timesteps.double().reshape(-1))
    candidates: dict[float, int] = {}
    for index, (values, call) in enumerate(calls):
        if values is None or len(set(values.reshape(-1).tolist())) > 1 or (call.batch or 0) < 2:
            continue
        if known is None or bool(known.find(values)[1].all()):
            candidates.setdefault(float(values.reshape(-1)[0]), index)
    chosen = _evenly(candidates)
    rest, held = [], []
    for index, (_, call) in enumerate(calls):
        value = next((value for value, place in chosen.items() if place == index), None)
        parts = None if value is None or call.batch is None else _cut(call, call.batch)
        if parts is None:
            rest.append(call)
        else:
            rest.append(parts[0])
            held.append(Probe(place=float(value or 0.0), timestep=value, call=parts[1]))
    if not held and len(rest) > 1:
        held = [Probe(place=0.0, timestep=None, call=rest.pop())]
    if not held:
        msg = "the calibration batches hold too little to keep an item back: pass several items of each timestep"
        raise CalibrationError(msg)
    return [_as_batch(call) for call in rest], held


def _evenly(candidates: dict[float, int]) -> dict[float, int]:
    """At most :data:`MOST_ITEMS` of the timesteps, the first and the last among them."""
    order = sorted(candidates)
    count = min(MOST_ITEMS, len(order))
    places = torch.linspace(0, max(len(order) - 1, 0), count).round().long().tolist()
    return {order[place]: candidates[order[place]] for place in places}


def _cut(call: Call, count: int) -> tuple[Call, Call] | None:
    """All items of a call but the last, and the last; None where it cannot be cut."""
    try:
        rest, last = call.take(torch.arange(count - 1)), call.take(torch.tensor([count - 1]))
    except InputError:
        return None
    leaves: list[Any] = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in last.leaves]
    return rest, replace(last, leaves=leaves)


def _as_batch(call: Call) -> Batch:
    args, kwargs = call.arguments()
    return {**dict(zip(call.interface.names, args, strict=False)), **kwargs}
