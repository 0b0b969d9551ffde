"""The timesteps of a schedule meet a model: those that batches hold, and those that its dtype can tell apart.

Which row of a table a timestep has is asked of :class:`~tfmq_fx.passes.support.timestep_values.ValueSearch` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from tfmq_fx.errors import CalibrationError, ConfigError
from tfmq_fx.frontend.batches import as_batches, timestep_of
from tfmq_fx.frontend.interface import Interface, interface_of, refresh_interface
from tfmq_fx.passes import WidenTimesteps
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps
from tfmq_fx.passes.temporal.widen_timesteps import integer_reader

__all__ = ["accept_timesteps", "check_table_is_hit", "recorded_timesteps", "with_table_check"]

T = TypeVar("T")


def accept_timesteps(graph_module: fx.GraphModule, timesteps: Tensor, timestep: str = "timestep") -> None:
    """Let a graph take these timesteps, in place: where they are fractional and its input has integers, as float32.

    Euler's schedules and Karras' sigmas are fractional, and models are often captured with whole timesteps.

    Args:
        graph_module: A captured, prepared or converted graph.
        timesteps: The timesteps that it is to serve.
        timestep: Name of its timestep input; a graph without one is left alone.

    Raises:
        ConfigError: They are fractional, and the graph needs integers: it would truncate them. Or two of them are one
            number in the dtype of the input.
    """
    inputs = {str(node.target): node_value(node) for node in graph_module.graph.nodes if node.op == "placeholder"}
    value, values = inputs.get(timestep), distinct_timesteps(timesteps)
    if not isinstance(value, Tensor):
        return
    dtype = value.dtype
    fractional = values[values != values.round()]
    if len(fractional) and not dtype.is_floating_point:
        reader = integer_reader(graph_module, timestep)
        if reader is not None:
            msg = (
                f"timestep {float(fractional[0]):g} is fractional, but the model was captured with {_name(dtype)} "
                f"timesteps and {reader.name!r} takes them as integers: capture it again with a float timestep"
            )
            raise ConfigError(msg)
        WidenTimesteps(timestep=timestep)(graph_module)
        refresh_interface(graph_module)
        dtype = torch.float32
    rows, _ = ValueSearch(values).find(values.to(dtype))
    merged = rows != torch.arange(len(values))
    if bool(merged.any()):
        msg = (
            f"timestep {float(values[merged][0]):.9g} cannot be told from its neighbours in {_name(dtype)}, which the "
            "model was captured with: capture it with a float32 timestep, or leave one of them out"
        )
        raise ConfigError(msg)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def recorded_timesteps(batches: Iterable[Mapping[str, Any]], timestep: str = "timestep") -> Tensor:
    """The timesteps of recorded batches, as the model saw them: the ``timesteps=`` of a model like Flux.

    Some pipelines change a timestep between scheduler and model: Flux's divides it by 1,000 and rounds it to the
    model's dtype. ``scheduler.timesteps`` is then no table for the model, what was recorded is::

        batches = tfmq_fx.record_trajectories(pipe, run, component="transformer")
        prepared = tfmq_fx.prepare(program, timesteps=tfmq_fx.recorded_timesteps(batches))

    Args:
        batches: Inputs by name, as :func:`tfmq_fx.record_trajectories` and :func:`tfmq_fx.sample_trajectories` return
            them. With the uniform sampler they hold every timestep of the schedule.
        timestep: Name of the timestep input.

    Returns:
        The distinct timesteps, the largest first, float64 ``[K]``.

    Raises:
        CalibrationError: There is no batch, or one has no timestep by that name.
    """
    columns = []
    for index, batch in enumerate(as_batches(batches)):
        if not isinstance(batch, Mapping) or batch.get(timestep) is None:
            names = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__} without names"
            msg = f"batch {index} has no {timestep!r} but {names}: name the timestep of recorded batches with timestep="
            raise CalibrationError(msg)
        columns.append(torch.as_tensor(batch[timestep]).detach().cpu().double().reshape(-1))
    if not columns:
        msg = "there are no batches to read timesteps off; record at least one call"
        raise CalibrationError(msg)
    return distinct_timesteps(torch.cat(columns).sort(descending=True).values)


def check_table_is_hit(values: Tensor, timesteps: Sequence[Tensor], timestep: str = "timestep") -> None:
    """Raise if the table has none of the calibration timesteps: it would serve a model on another scale.

    That 0 is in it says nothing, for 0 is 0 on every scale; with other timesteps at hand it does not count.

    Args:
        values: The table's timesteps, ``[K]``.
        timesteps: Those of each batch; without any, nothing is known and nothing checked.
        timestep: Name of the timestep input.

    Raises:
        CalibrationError: Names the first timestep, and what to do.
    """
    search = ValueSearch(distinct_timesteps(values))
    nonempty = [t.reshape(-1) for t in timesteps if t.numel()]
    compared = [t[t != 0] for t in nonempty if bool((t != 0).any())] or nonempty
    if not compared or any(bool(search.find(t)[1].any()) for t in compared):
        return
    first = compared[0][0]
    row, finite = search.nearest(first)
    nearest = f"nearest {float(search.values[row]):g}, " if bool(finite) else ""
    msg = (
        f"none of the calibration timesteps (first: {float(first):g}) is in the table ({nearest}{len(search.values)} "
        f"values from {float(search.values.max()):g} to {float(search.values.min()):g}): pass the timesteps as the "
        f"model sees them, timesteps=tfmq_fx.recorded_timesteps(batches{_argument(timestep)})"
    )
    raise CalibrationError(msg)


def _argument(timestep: str) -> str:
    return "" if timestep == "timestep" else f", {timestep!r}"


def with_table_check(
    graph_module: fx.GraphModule, values: Tensor | None, batches: Iterable[T], timestep: str = "timestep"
) -> Iterable[T]:
    """``batches``, held against the table: a sequence before anything runs, what is made on the way at its end.

    Args:
        graph_module: The graph that they are for.
        values: The table's timesteps, ``[K]``; None leaves the batches unchecked.
        batches: The model's own inputs, each a tuple, a mapping by argument name, or a single tensor.
        timestep: Name of the timestep input.

    Raises:
        CalibrationError: None of their timesteps is in the table.
    """
    if values is None:
        return batches
    interface = interface_of(graph_module)
    if isinstance(batches, Sequence):
        check_table_is_hit(values, [t for batch in batches for t in _timesteps(interface, batch, timestep)], timestep)
        return batches
    return _checked_after_last(values, interface, timestep, batches)


def _checked_after_last(values: Tensor, interface: Interface, timestep: str, batches: Iterable[T]) -> Iterator[T]:
    observed = []
    for batch in batches:
        observed += _timesteps(interface, batch, timestep)
        yield batch
    check_table_is_hit(values, observed, timestep)


def _timesteps(interface: Interface, batch: Any, timestep: str) -> list[Tensor]:
    """The timestep of a batch; none where the batch does not fit, which binding it reports."""
    value = timestep_of(interface, batch, timestep)
    return [] if value is None else [value]
