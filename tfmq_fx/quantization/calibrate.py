"""Calibration: run batches through the prepared graph, then fix the temporal block's own parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from rich.progress import track
from torch import Tensor, fx, nn

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.progress import draws_progress, progress_console
from tfmq_fx.errors import CalibrationError, NonFiniteError
from tfmq_fx.frontend.batches import Batch, as_batches, bind_batch, calls_by_timestep
from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.interface import TensorInput, interface_of
from tfmq_fx.frontend.notes import restore_notes
from tfmq_fx.frontend.program_stage import CAPTURED, PREPARED, describe, stage_of
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.observers.timestep_ranges import LEAST_ITEMS, CalibratedItems
from tfmq_fx.passes.support.timestep_values import distinct_timesteps
from tfmq_fx.quantization.equalize import equalize_channels
from tfmq_fx.quantization.low_rank import add_branches
from tfmq_fx.quantization.probes import Probes
from tfmq_fx.temporal.calibrate import calibrate_conditional_part, calibrate_temporal_block
from tfmq_fx.temporal.domain import conditioned_domain
from tfmq_fx.temporal.inputs import Conditionings
from tfmq_fx.temporal.refusal import refused_in_batch, refused_whole, timestep_ranges
from tfmq_fx.temporal.values import with_table_check

__all__ = ["Batch", "calibrate"]


@pipeline_stage
@torch.no_grad()
def calibrate(prepared: fx.GraphModule, batches: Iterable[Batch], *, progress: bool = True) -> int:
    """Observe the activation ranges over ``batches``; the temporal block is calibrated exactly, without them.

    A batch of several timesteps runs timestep by timestep, so that ranges depend on its items and not on how they were
    put together; one that cannot be cut (a fixed batch) runs as it is.
    Channels that do not share a range are scaled at the end (``scale_channels``), which changes no float result.
    Layers that depend on the timestep and the conditioning alone are calibrated over all timesteps, under the
    conditionings of the batches.

    A few items, spread over the timesteps, are kept with the float model's results for them, so that conversion can
    measure what was lost. They are items that the ranges were learnt from; none is held back.

    Args:
        prepared: The result of :func:`tfmq_fx.prepare`; its observers are updated in place.
        batches: The model's own inputs, each a tuple, a mapping by argument name, or a single tensor.
            :func:`tfmq_fx.sample_trajectories` makes them from a model or a pipeline.
        progress: Whether to draw a progress bar, where stderr is a terminal; ``TFMQ_FX_PROGRESS=0`` turns all off.

    Returns:
        The number of batches.

    Raises:
        CalibrationError: There is no batch, one does not fit the model, one holds NaN, or the table has the timesteps
            of none.
        NonFiniteError: A layer sees NaN or infinite values under a batch, at a timestep; the error names all three,
            and no observer has learnt from that batch.
    """
    stage = stage_of(prepared) if isinstance(prepared, fx.GraphModule) else ""
    state = PreparedState.find(prepared) if stage in (CAPTURED, PREPARED) else None
    # What is prepared and quantizes nothing has no observer, but a state; another quantizer's graph has no state.
    if stage != PREPARED and state is None:
        msg = f"calibrate needs a prepared graph, it was given {describe(prepared)}"
        raise CalibrationError(msg)
    restore_notes(prepared)
    timestep = "timestep" if state is None else state.timestep
    values = None if state is None or state.timesteps is None else distinct_timesteps(state.timesteps)
    conditionings = None
    if state is not None and state.conditions and values is not None:
        conditionings = Conditionings(state.path_inputs)
    interface = interface_of(prepared)
    batches = with_table_check(prepared, values, as_batches(batches), timestep)
    total = len(batches) if isinstance(batches, Sequence) else None
    index = interface.find(timestep)
    timed = index is not None and isinstance(interface.inputs[index], TensorInput)
    # Without timesteps nothing tells batches apart: observers smooth over them as they come.
    items, count = _calibrated_items(prepared) if timed else CalibratedItems(), 0
    tables = {} if state is None or values is None else {timestep: values, **_finite(state)}
    probes = Probes(prepared, tables)
    disabled, console = not draws_progress(progress), progress_console()
    for batch in track(batches, "calibrating", total=total, disable=disabled, transient=True, console=console):
        call = bind_batch(interface, count, batch, timestep)
        calls = calls_by_timestep(call, timestep)
        try:
            _observe(prepared, calls, items, count)
        except NonFiniteError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            msg = f"calibration batch {count} does not fit the captured model: {first}"
            raise CalibrationError(msg) from error
        if conditionings is not None:
            conditionings.add(prepared, call)
        probes.add(calls)
        count += 1
    if count == 0:
        msg = "calibration got no batches; pass at least one batch of the model's own inputs"
        raise CalibrationError(msg)
    if state is not None and state.config.scale_channels:
        equalize_channels(prepared, state.config.weight_bits)
    if state is not None:
        add_branches(prepared, state.config, timestep, tuple(state.finite))
    calibrate_temporal_block(prepared, timestep)
    if conditionings is not None and values is not None:
        calibrate_conditional_part(prepared, conditioned_domain(timestep, values, conditionings))
    probes.attach()
    return count


def _finite(state: PreparedState) -> dict[str, Tensor]:
    """By name, the values of the further inputs that the program will have rows for."""
    return {name: distinct_timesteps(values) for name, values in state.finite.items()}


def _calibrated_items(prepared: nn.Module) -> CalibratedItems:
    """The count that the observers of a graph share: that of an earlier calibration goes on."""
    ranges = timestep_ranges(prepared)
    items = next((value.items for value in ranges if value.items is not None), CalibratedItems())
    for value in ranges:
        value.items = items
    return items


def _observe(
    prepared: fx.GraphModule, calls: Sequence[tuple[Tensor | None, Call]], items: CalibratedItems, index: int
) -> None:
    """Run the calls of a batch, with the timesteps of each."""
    learnt: list[tuple[tuple[float, ...], int]] = []
    with refused_whole(prepared):
        for timesteps, call in calls:
            items.current = () if timesteps is None else tuple(sorted(set(timesteps.reshape(-1).tolist())))
            args, kwargs = call.arguments()
            with refused_in_batch(index, timesteps):
                prepared(*args, **kwargs)
            learnt.append((items.current, call.batch or LEAST_ITEMS))
    for current, number in learnt:
        items.add(current, number)
