"""What a timestep outside the table does, chosen after quantization."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, get_args

from tfmq_fx.config.checks import check_choice
from tfmq_fx.config.choices import UnknownTimestep
from tfmq_fx.passes import SetUnknownTimesteps
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["check_unknown_timestep", "with_unknown_timestep"]


def check_unknown_timestep(unknown: str | None) -> None:
    """Raise :class:`ConfigError` unless this is a policy for timesteps outside the table, or None."""
    if unknown is not None:
        check_choice("unknown_timestep", unknown, get_args(UnknownTimestep))


def with_unknown_timestep(program: QuantizedProgram, unknown: UnknownTimestep | None) -> QuantizedProgram:
    """A copy with this policy, which shares all tensors; None leaves the program as it was quantized.

    Raises:
        ConfigError: ``unknown`` is no policy.
    """
    check_unknown_timestep(unknown)
    if unknown is None or unknown == program.config.unknown_timestep:
        return program
    graph_module = program.graph_module
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    copied = copy.deepcopy(graph_module, shared)
    config = dataclasses.replace(program.config, unknown_timestep=unknown)
    SetUnknownTimesteps(config.lookup, timestep=program.timestep)(copied)
    return dataclasses.replace(program, config=config, graph_module=copied)
