"""Serve more timesteps: the temporal block needs no data, so neither do new rows of its tables."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.program_stage import describe
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.temporal.extend import extend_rows
from tfmq_fx.temporal.values import accept_timesteps

__all__ = ["add_timesteps"]


@pipeline_stage
def add_timesteps(program: QuantizedProgram, timesteps: Tensor | Iterable[float]) -> QuantizedProgram:
    """Return a program that serves further timesteps, without any data.

    Runs the quantized temporal block over the new timesteps and gives each its own parameters, exactly
    as finite set calibration did for the first ones; the rows that were there stay as they are. With
    ``activation_groups`` a new timestep joins the group of the nearest one that was there, the earlier row of two; so
    do layers of the timestep and the conditioning take the parameters of the nearest one, for want of conditionings.

    Args:
        program: A quantized program; it is not changed.
        timesteps: The timesteps to add; those in the table already are skipped.

    Raises:
        ConfigError: The program has no timestep table, or its table is all that is left of the temporal block. Or a
            timestep is fractional, and the captured model casts timesteps to integers.
    """
    if not isinstance(program, QuantizedProgram):
        msg = f"add_timesteps needs a quantized program, it was given {describe(program)}"
        raise ConfigError(msg)
    if program.timesteps is None:
        msg = "this program has no timestep table; quantize a model with a temporal block and pass timesteps"
        raise ConfigError(msg)
    if program.config.tabulates:
        served = ", ".join(f"{value:g}" for value in program.timesteps[:4].tolist())
        msg = (
            f"temporal={program.config.temporal!r} stored the features of {len(program.timesteps)} timesteps "
            f"({served}, …) and no block to compute others: quantize again with all timesteps, or with temporal='fsc'"
        )
        raise ConfigError(msg)
    new = copy.deepcopy(program)
    current = program.timesteps
    search = ValueSearch(current)
    requested = distinct_timesteps(list(timesteps) if isinstance(timesteps, Iterator) else timesteps)
    _, matched = search.find(requested)
    added = requested[~matched]
    new.timesteps = torch.cat([current, added])
    accept_timesteps(new.graph_module, new.timesteps, program.timestep)
    new.interface = interface_of(new.graph_module).called_like(program.interface)
    extend_rows(new.graph_module, added, program.timestep)
    return new
