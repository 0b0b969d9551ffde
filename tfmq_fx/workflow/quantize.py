"""The whole way in one call: capture, prepare, calibrate, reconstruct, convert."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import CalibrationError
from tfmq_fx.frontend.batches import as_batches, batch_arguments
from tfmq_fx.frontend.capture import capture
from tfmq_fx.frontend.export_inputs import Batched
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.quantization.calibrate import Batch, calibrate
from tfmq_fx.quantization.convert import convert
from tfmq_fx.quantization.fidelity_check import check_max_error
from tfmq_fx.quantization.prepare import prepare
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.reconstruction.reconstruct import reconstruct
from tfmq_fx.temporal.inputs import FiniteInputs

__all__ = ["quantize"]

log = logging.getLogger(__name__)


@pipeline_stage
def quantize(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    config: QuantizationConfig | None,
    batches: Iterable[Batch],
    *,
    timesteps: Tensor | Iterable[float] | None = None,
    timestep: str = "timestep",
    finite: FiniteInputs = (),
    batched: Batched | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    directory: str | Path | None = None,
    max_error: float | None = None,
    progress: bool = True,
) -> QuantizedProgram:
    """Quantize a diffusion model in one call.

    Args:
        model: What :func:`tfmq_fx.capture` takes; a captured graph among it, which is not changed.
        config: What to quantize; None is W8A8 with FSC. Weights of 6 bits or fewer are rounded by GPTQ, unless
            ``reconstruction`` says otherwise.
        batches: Calibration batches: the model's own inputs, as tuples or mappings
            (:func:`tfmq_fx.sample_trajectories` makes them). The first one is the example to capture with.
        timesteps: The timesteps of the schedule (``scheduler.timesteps``).
        timestep: Name of the model's timestep input.
        finite: Further inputs from a finite set (:func:`tfmq_fx.prepare`), e.g. ``("class_labels",)``.
        batched: The names of the inputs that have the batch, as for :func:`tfmq_fx.capture`.
        dynamic_batch: Whether the program serves any batch size, as for :func:`tfmq_fx.capture`; without it, that of
            the first batch alone.
        dynamic_shapes: As for :func:`tfmq_fx.capture`.
        directory: Where reconstruction keeps the state of finished units, to go on after an interrupt.
        max_error: The largest relative error of a timestep that is accepted (:func:`tfmq_fx.convert`); None accepts
            all, and warns.
        progress: Whether to draw progress bars, where stderr is a terminal; ``TFMQ_FX_PROGRESS=0`` turns all off.

    Returns:
        The quantized program: save it with :func:`tfmq_fx.save`, run it with :func:`tfmq_fx.lower`.

    Raises:
        CaptureError: The model cannot be captured.
        CalibrationError: There are no batches, or they do not fit.
        ConfigError: The model has a temporal block and no timesteps are given.
        FidelityError: The program is further from the float model than ``max_error``.
    """
    check_max_error(max_error)
    batches = list(as_batches(batches))
    if not batches:
        msg = "calibration got no batches; pass at least one batch of the model's own inputs"
        raise CalibrationError(msg)
    log.info("capturing %s", type(model).__name__)
    args, kwargs = batch_arguments(batches[0])
    program = capture(
        model, args, example_kwargs=kwargs, dynamic_batch=dynamic_batch, batched=batched, dynamic_shapes=dynamic_shapes,
        timestep=timestep,
    )  # fmt: skip
    chosen = QuantizationConfig.of(config)
    prepared = prepare(program, chosen, timesteps=timesteps, timestep=timestep, finite=finite)
    log.info("calibrating on %d batches", len(batches))
    calibrate(prepared, batches, progress=progress)
    if (method := chosen.resolved_reconstruction) is not None:
        log.info("reconstructing")
        reconstruct(prepared, batches, method, directory=directory, progress=progress)
    log.info("converting")
    return convert(prepared, max_error=max_error)
