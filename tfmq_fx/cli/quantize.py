"""``tfmq-fx quantize``: a float model in, an artefact with integer weights out."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

from tfmq_fx.cli.console import console, size_text, stage
from tfmq_fx.cli.options import (
    ActivationBits,
    ActivationRange,
    ActivationRangeOption,
    BatchSizeOption,
    CacheBytes,
    CalibrationSamples,
    Iterations,
    KeepFloat,
    Model,
    NdtcMean,
    OutFolder,
    Reconstruction,
    ReconstructionOption,
    Sampler,
    SamplerOption,
    Seed,
    Steps,
    Temporal,
    TemporalIterations,
    TemporalOption,
    UnknownTimestep,
    UnknownTimestepOption,
    WeightBits,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from tfmq_fx.program import QuantizedProgram
    from tfmq_fx.reconstruction_config import ReconstructionConfig

__all__ = ["quantize"]

#: Rows per step on average that calibration sees; fewer when there are fewer trajectories.
ROWS_PER_STEP = 8


def quantize(
    out: OutFolder,
    model: Model = None,
    weight_bits: WeightBits = 8,
    activation_bits: ActivationBits = 8,
    temporal: TemporalOption = Temporal.FSC,
    unknown_timestep: UnknownTimestepOption = UnknownTimestep.ERROR,
    keep_float: KeepFloat = ["input", "output"],  # noqa: B006  (typer shows the default; nothing changes it)
    steps: Steps = 50,
    calibration_samples: CalibrationSamples = 64,
    sampler: SamplerOption = Sampler.UNIFORM,
    ndtc_mean: NdtcMean = 0.4,
    activation_range: ActivationRangeOption = ActivationRange.EMA,
    batch_size: BatchSizeOption = 16,
    reconstruction: ReconstructionOption = Reconstruction.NONE,
    iterations: Iterations = 20_000,
    temporal_iterations: TemporalIterations = 20_000,
    cache_gib: CacheBytes = 2.0,
    seed: Seed = 0,
) -> None:
    """Quantize an unconditional diffusion model and save it as an artefact.

    With --reconstruction, finished units are kept beside the artefact until it is saved: the same command goes on
    where an interrupted one stopped.
    """
    from tfmq_fx.artefact import save
    from tfmq_fx.calibration import calibrate
    from tfmq_fx.capture import capture
    from tfmq_fx.cli.example_inputs import unconditional_inputs
    from tfmq_fx.comparison import ddim_scheduler
    from tfmq_fx.config import QuantizationConfig
    from tfmq_fx.convert import convert
    from tfmq_fx.models_bundle import load_model
    from tfmq_fx.prepare import prepare
    from tfmq_fx.reconstruction import reconstruct
    from tfmq_fx.trajectories import NormalTimesteps, sample_trajectories

    # Everything that can be wrong with the command is found before the minutes of calibration.
    _refuse_foreign(out)
    config = QuantizationConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        temporal=temporal.value,
        activation_range=activation_range.value,
        unknown_timestep=unknown_timestep.value,
        keep_float=tuple(keep_float),
        reconstruction=_reconstruction(reconstruction, iterations, temporal_iterations, seed),
    )
    strategy = NormalTimesteps(ndtc_mean) if sampler is Sampler.NDTC else sampler.value
    stage("loading the model")
    module, scheduler = load_model(model)
    inputs = unconditional_inputs(module)
    ddim = ddim_scheduler(scheduler, steps)
    stage("capturing its graph and inserting observers")
    prepared = prepare(capture(module, example_kwargs=inputs), config, timesteps=ddim.timesteps)
    stage(f"sampling {calibration_samples} trajectories of {steps} steps with the float model")
    batches = sample_trajectories(
        module,
        ddim,
        steps=steps,
        samples=calibration_samples,
        batch_size=batch_size,
        keep=min(ROWS_PER_STEP, calibration_samples),
        sampler=strategy,
        seed=seed,
    )
    stage(f"calibrating on {len(batches)} batches")
    calibrate(prepared, batches)
    state = out.with_name(f".{out.name}.reconstruction")
    if config.reconstruction is not None:
        stage(f"reconstructing; interrupted, the same command goes on with what is in {state}")
        report = reconstruct(prepared, batches, directory=state, cache_bytes=int(cache_gib * 2**30))
        console().print(str(report), soft_wrap=True, markup=False)
    stage("converting to integers and saving")
    program = convert(prepared)
    program.scheduler = {name: value for name, value in ddim.config.items() if not name.startswith("_")}
    save(program, out)
    shutil.rmtree(state, ignore_errors=True)
    _print_summary(module, program, out)


def _reconstruction(
    name: Reconstruction, iterations: int, temporal_iterations: int, seed: int
) -> ReconstructionConfig | None:
    from tfmq_fx.reconstruction_config import ReconstructionConfig

    config = ReconstructionConfig.of(name.value)
    if config is None:
        return None
    return dataclasses.replace(config, iterations=iterations, temporal_iterations=temporal_iterations, seed=seed)


def _refuse_foreign(out: Path) -> None:
    """Refuse early what ``save`` would refuse at the end.

    Raises:
        ArtefactError: The path holds something that is not an artefact.
    """
    from tfmq_fx.artefact.layout import is_artefact
    from tfmq_fx.errors import ArtefactError

    if out.exists() and not is_artefact(out):
        msg = f"{out} exists and is not an artefact of tfmq_fx; choose another path or remove it first"
        raise ArtefactError(msg)


def _print_summary(module: nn.Module, program: QuantizedProgram, out: Path) -> None:
    from tfmq_fx.comparison import float_bytes, path_bytes

    before, after = float_bytes(module), path_bytes(out)
    timesteps = program.timesteps
    rows = 0 if timesteps is None else len(timesteps)
    console().print(
        f"[bold green]{out}[/]: {size_text(after)}, {after / before:.2f} × the fp32 weights ({size_text(before)}); "
        f"{rows} timesteps, {len(program.kept_float)} layers kept float",
        soft_wrap=True,
    )
