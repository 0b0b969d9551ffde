"""Prepare: insert observers, the temporal ones indexed by timestep."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, fx
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.notes import restore_notes
from tfmq_fx.frontend.program_stage import CAPTURED, describe, stage_of
from tfmq_fx.frontend.roles import sample_inputs
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.passes.analysis import conditioning_inputs, find_temporal_block
from tfmq_fx.passes.analysis.table_row import several_timesteps
from tfmq_fx.quantization.annotate import TFMQQuantizer
from tfmq_fx.temporal.inputs import FiniteInputs, as_finite, finite_values

__all__ = ["prepare"]


@pipeline_stage
def prepare(
    program: fx.GraphModule,
    config: QuantizationConfig | None = None,
    *,
    timesteps: Tensor | Iterable[float] | None = None,
    timestep: str = "timestep",
    finite: FiniteInputs = (),
) -> fx.GraphModule:
    """Return a copy of a captured program with observers in it, ready to calibrate.

    The same as ``prepare_pt2e(copy.deepcopy(program), TFMQQuantizer(config, timesteps=timesteps))``.

    Args:
        program: The captured graph; it is not changed.
        config: What to quantize; W8A8 with FSC by default.
        timesteps: The timesteps of the schedule (``scheduler.timesteps``).
        timestep: Name of the model's timestep input.
        finite: Further inputs from a finite set that the temporal block may depend on: a name, names, such
            as ``("class_labels",)``, or values by name, such as ``{"class_labels": [1, 207]}``.

    Raises:
        CaptureError: ``program`` is not a captured graph, or it has no temporal block, nor layers of the timestep
            and the conditioning alone, and the configuration does not say ``temporal="float"``.
        ConfigError: The model has such layers and no timesteps are given, or a finite input is not one of
            the model's or its values are not known.
    """
    if not isinstance(program, fx.GraphModule) or stage_of(program) != CAPTURED:
        msg = f"prepare needs a captured graph, it was given {describe(program)}"
        raise CaptureError(msg)
    config = QuantizationConfig.of(config)
    if config.temporal != "float" and (axes := several_timesteps(program, timestep)):
        msg = (
            f"{timestep!r} was captured with {axes} axes, such as one timestep per token or frame, and a table has one "
            "row per item: capture it with one per item, or quantize without a table, with temporal='float'"
        )
        raise CaptureError(msg)
    finite = as_finite(finite)
    finite_values(program, finite)
    block = find_temporal_block(program, timestep, finite=tuple(finite))
    samples = {str(node.target) for node in sample_inputs(program.graph, timestep)}
    if not block and not conditioning_inputs(program, samples, timestep) and config.temporal != "float":
        msg = (
            f"the model has no temporal block: {block.reason}; name its timestep input with timestep=, "
            "or quantize it as an ordinary model with temporal='float'"
        )
        raise CaptureError(msg)
    quantizer = TFMQQuantizer(config, timesteps=timesteps, timestep=timestep, finite=finite)
    copied = copy.deepcopy(program)
    restore_notes(copied)
    prepared = prepare_pt2e(copied, quantizer)
    assert isinstance(prepared, fx.GraphModule)
    return prepared
