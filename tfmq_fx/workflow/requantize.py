"""Other weights of a quantized architecture: its ranges are kept, so there is nothing to calibrate."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tfmq_fx.artefact.load import load
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import CalibrationError, ConfigError
from tfmq_fx.frontend.batches import Batch, as_batches, bind_batch, calls_by_timestep
from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.drawn_calls import drawn_call
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.program_stage import describe
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.quantization.capture_like import capture_like
from tfmq_fx.quantization.convert import convert
from tfmq_fx.quantization.fidelity_check import check_max_error
from tfmq_fx.quantization.keep_parameters import KeptQuantizers, prepare_like
from tfmq_fx.quantization.probes import Probes
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.range_check import seen_unrounded, widen_ranges
from tfmq_fx.quantization.requantization import Requantization
from tfmq_fx.quantization.same_architecture import check_whole
from tfmq_fx.reconstruction.reconstruct import reconstruct
from tfmq_fx.temporal.calibrate import calibrate_temporal_block
from tfmq_fx.temporal.refusal import refused_in_batch
from tfmq_fx.temporal.values import with_table_check

__all__ = ["requantize"]

log = logging.getLogger(__name__)

#: The calls of one batch or of drawn noise, with the timesteps of each.
Calls = list[tuple[Tensor | None, Call]]


@pipeline_stage
def requantize(
    quantized: QuantizedProgram | str | Path,
    model: nn.Module | fx.GraphModule | ExportedProgram,
    batches: Iterable[Batch] | None = None,
    *,
    reconstruction: ReconstructionConfig | Mapping[str, Any] | str | None = None,
    directory: str | Path | None = None,
    max_error: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> QuantizedProgram:
    """Quantize other weights of an architecture that was quantized before: a fine-tune, or a LoRA fused into them.

    The ranges of the activations are kept, those by timestep row by row, and so is all that the configuration says:
    factors of channels, widths, layers kept float. Weights get scales of their own, and the temporal block exact ranges
    again, which depend on its weights and the timesteps alone. So this takes no trajectories, and seconds.

    A few calls are run to see whether activations leave the kept ranges, and ranges that are left are widened
    (``program.requantization`` says which, how much, and how far the result is from float). With ``batches`` these are
    the calls, and what they see counts as it is. Without, there is only noise to draw, at the noisiest timestep and in
    the middle of the schedule. At the first, noise is what sampling starts from; at others, and for conditionings, it
    is not what the model will see. Ranges are then compared with those that the program's own weights have on the same
    noise, and grow in proportion; what a fine-tune changes only on real images or prompts stays unseen. An error that
    was measured on noise is none of real samples, so ``program.fidelity`` has it only with ``batches``.

    Args:
        quantized: The quantized program, or the folder of its artefact; it is not changed.
        model: The float model with the other weights, as for :func:`tfmq_fx.capture`; it is not changed.
        batches: A few of the model's own inputs, each a tuple, a mapping by argument name, or a single tensor. Rounding
            that looks at data, as GPTQ's, needs them.
        reconstruction: How weights are rounded, in the place of what the program's configuration says:
            ``"nearest"``, or what ``QuantizationConfig.reconstruction`` takes.
        directory: As for :func:`tfmq_fx.reconstruct`.
        max_error: The largest relative error of a timestep that is accepted (:func:`tfmq_fx.convert`), on the calls of
            the check; None accepts all, and warns.
        seed: Of the noise.
        progress: Whether reconstruction draws a progress bar.

    Returns:
        The program of the other weights, with the scheduler of the first one.

    Raises:
        CaptureError: The model has another architecture, shapes or inputs, or its weights are quantized, or not finite.
        ConfigError: The configuration's reconstruction needs batches and there are none, or ``quantized`` is no
            program.
        CalibrationError: There are no batches in ``batches``, or they do not fit.
        ArtefactError: The artefact cannot be loaded.
        FidelityError: The program is further from the float model than ``max_error``.
    """
    check_max_error(max_error)
    program = load(quantized) if isinstance(quantized, (str, Path)) else quantized
    if not isinstance(program, QuantizedProgram):
        msg = f"requantize keeps the ranges of a quantized program or its artefact, it was given {describe(program)}"
        raise ConfigError(msg)
    if reconstruction is not None:
        chosen = ReconstructionConfig.of(reconstruction)
        program = dataclasses.replace(program, config=dataclasses.replace(program.config, reconstruction=chosen))
    given = None if batches is None else list(as_batches(batches))
    _check_batches(program.config, given)
    log.info("capturing %s", type(model).__name__)
    captured = capture_like(model, program)
    log.info("preparing it with the ranges that are there")
    prepared, kept = prepare_like(captured, program)
    log.info("checking the ranges")
    report = _checked(prepared, kept, program, given, seed)
    calibrate_temporal_block(prepared, program.timestep)
    if (method := program.config.resolved_reconstruction) is not None and given is not None:
        log.info("reconstructing")
        reconstruct(prepared, given, method, directory=directory, progress=progress)
    log.info("converting")
    converted = convert(prepared, max_error=max_error)
    check_whole(converted, program)
    return dataclasses.replace(
        converted,
        scheduler=dict(program.scheduler),
        fidelity=None if report.drawn else converted.fidelity,
        requantization=dataclasses.replace(report, fidelity=converted.fidelity),
    )


def _check_batches(config: QuantizationConfig, batches: list[Batch] | None) -> None:
    method = config.resolved_reconstruction
    if method is not None and batches is None:
        msg = (
            f"this program's configuration rounds weights by reconstruction={method.method!r}, which looks at data: "
            "pass a few batches=, or round to nearest with reconstruction='nearest', which loses more"
        )
        raise ConfigError(msg)
    if batches is not None and not batches:
        msg = "batches= is empty: pass at least one batch of the model's own inputs, or leave it out"
        raise CalibrationError(msg)


@torch.no_grad()
def _checked(
    prepared: fx.GraphModule,
    kept: KeptQuantizers,
    program: QuantizedProgram,
    batches: list[Batch] | None,
    seed: int,
) -> Requantization:
    """Run the calls of the check, widen what they leave, and let the graph carry items to measure the error on."""
    timestep, interface = program.timestep, interface_of(prepared)
    state = PreparedState.of(prepared)
    if batches is None:
        call = drawn_call(prepared, interface, program.indexed, timestep, seed)
        by_batch = [calls_by_timestep(call, timestep)]
    else:
        checked = with_table_check(prepared, program.timesteps, batches, timestep)
        bound = (bind_batch(interface, index, batch, timestep) for index, batch in enumerate(checked))
        by_batch = [calls_by_timestep(call, timestep) for call in bound]
    probes = Probes(prepared, program.indexed if state.timesteps is not None else {})
    timesteps: list[float] = []
    for index, calls in enumerate(by_batch):
        results = []
        for values, call in calls:
            args, kwargs = call.arguments()
            with refused_in_batch(index, values):
                results.append(prepared(*args, **kwargs))
            timesteps += [] if values is None else values.reshape(-1).tolist()
        probes.add(calls, results)
    flat = [call for calls in by_batch for _, call in calls]
    reference = seen_unrounded(program.graph_module, kept, flat) if batches is None else None
    widened = widen_ranges(prepared, kept, reference)
    probes.attach()
    distinct = tuple(dict.fromkeys(map(float, timesteps)))
    return Requantization(len(kept), widened, distinct, drawn=batches is None, fidelity=None)
