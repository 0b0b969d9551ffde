"""``quantize_pipeline``: a pipeline's denoiser, quantized over trajectories as users run them, in its place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.data.recorded_calls import CallRecorder, check_call, select_samples
from tfmq_fx.data.timestep_samplers import UniformTimesteps
from tfmq_fx.diffusers.components import Component, find_components
from tfmq_fx.diffusers.pipeline_calls import PipelineCalls
from tfmq_fx.diffusers.skeleton import check_accelerate
from tfmq_fx.errors import CalibrationError, CaptureError, ConfigError
from tfmq_fx.frontend.export_inputs import Batched
from tfmq_fx.frontend.surroundings import evaluation_mode
from tfmq_fx.quantization.fidelity_check import check_max_error
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.temporal.inputs import FiniteInputs
from tfmq_fx.temporal.values import recorded_timesteps
from tfmq_fx.workflow.quantize import quantize

__all__ = ["quantize_pipeline"]

Pipeline = TypeVar("Pipeline")
Batches = list[dict[str, Any]]

log = logging.getLogger(__name__)


def quantize_pipeline(
    pipeline: Pipeline,
    prompts: Sequence[str] | str | None = None,
    config: QuantizationConfig | Mapping[str, QuantizationConfig] | None = None,
    *,
    components: Sequence[str] | None = None,
    steps: int | None = None,
    calls: int | None = None,
    keep: int = 8,
    seed: int = 0,
    timestep: str | None = None,
    finite: FiniteInputs = (),
    batched: Batched | None = None,
    dynamic_batch: bool | None = None,
    lower: str | None = None,
    directory: str | Path | None = None,
    max_error: float | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Pipeline:
    """Quantize the denoiser of a diffusers pipeline, and put it in its place.

    The pipeline is called once for each prompt, with its own scheduler, guidance and everything else that it is used
    with. The calls of its denoiser are what it is calibrated on, and the timesteps that the denoiser saw then are those
    of the table. Of every call of the pipeline only what is kept of it stays in memory. The same call again records the
    same; what was reconstructed before an interrupt is taken from ``directory``.

    Args:
        pipeline: A diffusers pipeline on the CPU.
        prompts: Prompts, one call each. None is for pipelines without prompts, or with ``prompt_embeds=`` and the like
            among ``arguments``.
        config: What to quantize, for all components or by the name of each; None is W8A8 with FSC.
        components: What to quantize: names of denoisers, and ``"vae"`` for the decoder of an autoencoder, which has no
            timestep. By default every denoiser: both experts where there are two.
        steps: Sampling steps of a call (``num_inference_steps``).
        calls: The number of calls: by default one a prompt, four without prompts. Noise is another one in each.
        keep: Samples kept per timestep on average; of a decoder, samples.
        seed: Seed of the noise and of the choice of samples.
        timestep: Name of the denoiser's timestep argument, where it is none of the usual ones.
        finite: As for :func:`tfmq_fx.quantize`.
        batched: As for :func:`tfmq_fx.record_trajectories`.
        dynamic_batch: As for :func:`tfmq_fx.quantize`. None is True where the model can be captured so; a program of
            one that cannot serves the batch that was recorded alone, and a warning says so.
        lower: What runs it, as for :func:`tfmq_fx.diffusers.to_diffusers`; None compiles when it is first called.
        directory: Where reconstruction keeps its state, in a folder for each component.
        max_error: As for :func:`tfmq_fx.quantize`.
        progress: Whether to draw progress bars of calibration and reconstruction. While it is recorded the pipeline
            draws its own (``pipeline.set_progress_bar_config``).
        **arguments: Further arguments of every call of the pipeline: ``guidance_scale``, ``height``, ``image`` …

    Returns:
        The same pipeline. Nothing of it is replaced before all components are quantized.

    Raises:
        ConfigError: There is no such component or argument.
        CalibrationError: A component was never called.
        CaptureError: A component cannot be captured.
        FidelityError: A program is further from the float model than ``max_error``.
        UnsupportedError: accelerate is not installed.
    """
    check_accelerate()
    check_max_error(max_error)
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        msg = f"keep={keep!r} must be a whole number of at least 1"
        raise ConfigError(msg)
    parts = find_components(pipeline, components, timestep)
    configs = _configs(config, parts)
    decodes = any(part.timestep is None for part in parts)
    runs = PipelineCalls(pipeline, prompts, calls, steps, seed, arguments, decodes=decodes)

    def quantized(part: Component, batches: Batches, *, dynamic: bool) -> QuantizedProgram:
        return quantize(
            part.module, configs[part.name], batches, timesteps=_timesteps(batches, part), batched=batched,
            timestep=part.timestep or "timestep", finite=() if part.timestep is None else finite,
            dynamic_batch=dynamic, directory=None if directory is None else Path(directory) / part.name,
            max_error=max_error, progress=progress,
        )  # fmt: skip

    names = (batched,) if isinstance(batched, str) else batched
    recorded = _record(pipeline, parts, runs, keep, names, whole=dynamic_batch is False)
    programs: dict[str, QuantizedProgram] = {}
    for part in parts:
        log.info("quantizing %s", part.name)
        try:
            programs[part.name] = quantized(part, recorded[part.name], dynamic=dynamic_batch is not False)
        except (CaptureError, IndexError) as error:
            if dynamic_batch is not None:
                raise
            # Its items cannot be told apart: what was cut with the batch may be no part of it.
            whole = _record(pipeline, [part], runs, keep, names, whole=True)[part.name]
            programs[part.name] = quantized(part, whole, dynamic=False)
            msg = f"{part.name!r} serves calls of the batch that was recorded alone, guidance included: {error}"
            warnings.warn(msg, stacklevel=2)
    for part in parts:
        part.place(programs[part.name], lower)
    return pipeline


def _configs(
    config: QuantizationConfig | Mapping[str, QuantizationConfig] | None, parts: Sequence[Component]
) -> dict[str, QuantizationConfig]:
    names = [part.name for part in parts]
    given = config if isinstance(config, Mapping) else dict.fromkeys(names, config)
    if unknown := [name for name in given if name not in names]:
        msg = f"config= has {unknown[0]!r}, which is none of the components that are quantized: {', '.join(names)}"
        raise ConfigError(msg)
    configs = {part.name: QuantizationConfig.of(given.get(part.name)) for part in parts}
    # What has no timestep is an ordinary model.
    ordinary = {part.name for part in parts if part.timestep is None}
    return {name: replace(chosen, temporal="float") if name in ordinary else chosen for name, chosen in configs.items()}


def _timesteps(batches: Batches, part: Component) -> Tensor | None:
    return None if part.timestep is None else recorded_timesteps(batches, timestep=part.timestep)


@torch.no_grad()
def _record(
    pipeline: Any, parts: Sequence[Component], runs: PipelineCalls, keep: int, batched: Batched | None, *, whole: bool
) -> dict[str, Batches]:
    """Batches of each component, thinned out after each call of the pipeline; ``whole`` keeps calls as they are."""
    scheduler = getattr(pipeline, "scheduler", None)
    horizon = int(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))
    generator = torch.Generator().manual_seed(runs.seed)
    kept: dict[str, Batches] = {part.name: [] for part in parts}
    for index in range(runs.count):
        log.info("recording call %d of %d", index + 1, runs.count)
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(evaluation_mode(part.module))
            recorders = [stack.enter_context(CallRecorder(part.module, part.timestep)) for part in parts]
            runs.run(index)
        for part, recorder in zip(parts, recorders, strict=True):
            for number, call in enumerate(recorder.calls):
                check_call(number, call, part.timestep)
            if whole:
                kept[part.name] += _whole_calls(recorder.calls, index, runs.count, keep)
                continue
            for share, chosen in _shares(recorder.calls, index, runs.count, keep).items():
                kept[part.name] += select_samples(
                    chosen, part.timestep, batched, UniformTimesteps(), share, horizon, generator
                )
    for name, batches in kept.items():
        if not batches:
            msg = f"the pipeline never called its {name!r}; leave it out of components="
            raise CalibrationError(msg)
    return kept


def _whole_calls(calls: Batches, index: int, count: int, keep: int) -> Batches:
    """The calls of one run that are kept as they are: all of ``keep`` runs, or, of more, every timestep in ``keep``."""
    return [call for number, call in enumerate(calls) if (index + number) % count < keep]


def _shares(calls: Batches, index: int, count: int, keep: int) -> dict[int, Batches]:
    """How many samples are kept of which denoiser calls, so that every run gives some and every timestep gets ``keep``.

    Args:
        calls: The denoiser's in one run.
        index: The run's number.
        count: The number of runs.
        keep: Samples kept per timestep of all runs.
    """
    shares: dict[int, Batches] = {}
    for number, call in enumerate(calls):
        share = keep // count + ((index + number) % count < keep % count)
        if share:
            shares.setdefault(share, []).append(call)
    return shares
