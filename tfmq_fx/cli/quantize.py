"""``tfmq-fx quantize``: a float model in, an artefact with integer weights out."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import typer

from tfmq_fx.cli.configuration_options import configuration_of_options, missing_for_options
from tfmq_fx.cli.console import console, stage
from tfmq_fx.cli.float_models import require_no_artefact
from tfmq_fx.cli.given_options import is_given, refuse_without_effect
from tfmq_fx.cli.options import (
    ActivationBits,
    ActivationRangeOption,
    BatchSizeOption,
    CacheBytes,
    CalibrationSamples,
    ConfigOption,
    Iterations,
    KeepFloat,
    MaxError,
    Model,
    NdtcMean,
    OutFolder,
    PresetOption,
    PrintAfter,
    ReconstructionOption,
    SamplerOption,
    Seed,
    Steps,
    TemporalIterations,
    TemporalOption,
    UnknownTimestepOption,
    WeightBits,
)
from tfmq_fx.cli.pipeline_options import ClassLabels, ComponentOption, Guidance, PromptsFile, Size
from tfmq_fx.cli.quantize_pipeline import RecordedCalls, quantize_pipeline_folder
from tfmq_fx.cli.requantize import LoraOption, LoraScale, RangesFrom, requantize
from tfmq_fx.cli.summary import print_summary

if TYPE_CHECKING:
    from tfmq_fx.config.presets import Preset

__all__ = ["quantize"]


def quantize(
    context: typer.Context,
    out: OutFolder,
    model: Model = None,
    preset: PresetOption = None,
    config_file: ConfigOption = None,
    weight_bits: WeightBits = 8,
    activation_bits: ActivationBits = 8,
    temporal: TemporalOption = "fsc",
    unknown_timestep: UnknownTimestepOption = "extend",
    keep_float: KeepFloat = ["input", "output"],  # noqa: B006  (typer shows the default; nothing changes it)
    steps: Steps = 50,
    calibration_samples: CalibrationSamples = 64,
    sampler: SamplerOption = "uniform",
    ndtc_mean: NdtcMean = 0.4,
    activation_range: ActivationRangeOption = "ema",
    batch_size: BatchSizeOption = 16,
    reconstruction: ReconstructionOption = None,
    iterations: Iterations = 20_000,
    temporal_iterations: TemporalIterations = 20_000,
    cache_gib: CacheBytes = 2.0,
    max_error: MaxError = None,
    ranges_from: RangesFrom = None,
    lora: LoraOption = None,
    lora_scale: LoraScale = 1.0,
    prompts: PromptsFile = None,
    class_labels: ClassLabels = None,
    component: ComponentOption = [],  # noqa: B006
    guidance: Guidance = None,
    size: Size = None,
    print_after: PrintAfter = [],  # noqa: B006
    seed: Seed = 0,
) -> None:
    """Quantize an unconditional diffusion model and save it as an artefact; with --ranges-from any model.

    With --prompts, --class-labels or --component MODEL is run as a pipeline, as its users run it, and the whole
    pipeline is saved with its denoiser quantized; `sample` and diffusers load it.

    Weights of 6 bits or fewer are rounded by GPTQ unless --reconstruction says otherwise. Finished units are kept
    beside the artefact until it is saved: the same command goes on where an interrupted one stopped.
    """
    from tfmq_fx.artefact.folder import check_target
    from tfmq_fx.artefact.save import save
    from tfmq_fx.cli.configuration_file import read_configuration
    from tfmq_fx.cli.example_inputs import unconditional_inputs
    from tfmq_fx.config.presets import find_preset
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.data.lora import fuse_lora
    from tfmq_fx.data.sampling import sample_trajectories
    from tfmq_fx.data.timestep_samplers import NormalTimesteps
    from tfmq_fx.diagnostics.comparison import ddim_scheduler
    from tfmq_fx.errors import ConfigError, FidelityError
    from tfmq_fx.frontend.capture import capture
    from tfmq_fx.passes import observe_passes
    from tfmq_fx.quantization.calibrate import calibrate
    from tfmq_fx.quantization.convert import convert
    from tfmq_fx.quantization.fidelity_check import check_max_error
    from tfmq_fx.quantization.prepare import prepare
    from tfmq_fx.reconstruction.reconstruct import reconstruct

    # Everything that can be wrong with the command is found before the minutes of calibration.
    context.with_resource(observe_passes(print_after=print_after))
    runs_pipeline = prompts is not None or class_labels is not None or bool(component)
    if not runs_pipeline:
        check_target(out)
    check_max_error(max_error)
    require_no_artefact(model)
    refuse_without_effect(context, {"lora_scale": None if lora is not None else "--lora"})
    if ranges_from is not None:
        requantize(
            context,
            model=model,
            artefact=ranges_from,
            out=out,
            lora=lora,
            lora_scale=lora_scale,
            reconstruction=reconstruction,
            max_error=max_error,
            seed=seed,
        )
        return
    missing = None if runs_pipeline else "--prompts, --class-labels or --component"
    refuse_without_effect(context, dict.fromkeys(("guidance", "size"), missing))
    if preset is not None and config_file is not None:
        msg = "--preset and --config both say what is quantized: leave one of them out"
        raise ConfigError(msg)
    method = None if preset is None else find_preset(preset)
    written = None if config_file is None else read_configuration(config_file)
    config = configuration_of_options(
        context,
        method,
        written,
        seed,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        temporal=temporal,
        activation_range=activation_range,
        unknown_timestep=unknown_timestep,
        keep_float=tuple(keep_float),
        reconstruction=reconstruction,
        iterations=iterations,
        temporal_iterations=temporal_iterations,
    )
    if runs_pipeline:
        quantize_pipeline_folder(
            context,
            model,
            out,
            config,
            method,
            RecordedCalls(
                prompts=prompts,
                class_labels=class_labels,
                components=component,
                steps=steps if is_given(context, "steps") else None,
                guidance=guidance,
                size=size,
                calls=calibration_samples if is_given(context, "calibration_samples") else None,
                seed=seed,
            ),
            lora=lora,
            lora_scale=lora_scale,
            max_error=max_error,
        )
        if method is not None:
            _print_remaining_steps(method)
        return
    if method is not None and not is_given(context, "sampler"):
        sampler = method.sampler
    refuse_without_effect(context, missing_for_options(config, sampler))
    strategy = NormalTimesteps(ndtc_mean) if sampler == "ndtc" else sampler
    stage("loading the model")
    module, scheduler = load_model(model)
    inputs = unconditional_inputs(module)
    if lora is not None:
        stage(f"fusing {len(fuse_lora(module, lora, lora_scale))} layers of {lora}")
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
        sampler=strategy,
        seed=seed,
    )
    stage(f"calibrating on {len(batches)} batches")
    calibrate(prepared, batches)
    state = out.with_name(f".{out.name}.reconstruction")
    if config.resolved_reconstruction is not None:
        stage(f"reconstructing; interrupted, the same command goes on with what is in {state}")
        report = reconstruct(prepared, batches, directory=state, cache_bytes=int(cache_gib * 2**30))
        console().print(str(report), soft_wrap=True, markup=False)
    stage("converting to integers and saving")
    try:
        program = convert(prepared, max_error=max_error)
    except FidelityError:
        shutil.rmtree(state, ignore_errors=True)  # the same command would end here again
        raise
    program.scheduler = {name: value for name, value in ddim.config.items() if not name.startswith("_")}
    save(program, out)
    shutil.rmtree(state, ignore_errors=True)
    print_summary(module, program, out)
    if method is not None:
        _print_remaining_steps(method)


def _print_remaining_steps(method: Preset) -> None:
    """What of a method is not in the artefact."""
    wrappers = [
        name
        for name, needed in (
            ("PTQDScheduler", method.corrects_noise),
            ("QuantizedSampleScheduler", method.quantizes_sample),
        )
        if needed
    ]
    if wrappers:
        text = (
            f"{method.name} goes on in the sampler: wrap the scheduler in tfmq_fx.schedulers.{' and '.join(wrappers)}"
        )
        console().print(text, soft_wrap=True, markup=False)
    if method.limitations:
        console().print(f"not in this preset: {method.limitations}", soft_wrap=True, markup=False)
