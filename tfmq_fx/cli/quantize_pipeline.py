"""``tfmq-fx quantize`` for a pipeline: run with its prompts, quantized over what was seen, saved as a whole."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tfmq_fx.cli.console import console, size_text, stage
from tfmq_fx.cli.given_options import is_given
from tfmq_fx.cli.pipeline_call import CALL_FILE, PipelineCall, read_prompts
from tfmq_fx.cli.pipeline_options import parse_class_labels, parse_size
from tfmq_fx.cli.pipelines import check_components, load_float_pipeline
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from tfmq_fx.config.presets import Preset
    from tfmq_fx.config.quantization import QuantizationConfig

__all__ = ["RecordedCalls", "quantize_pipeline_folder"]

#: Options of ``quantize`` that say how an unconditional model is sampled, or how reconstruction caches.
WITHOUT_EFFECT = ("sampler", "ndtc_mean", "batch_size", "cache_gib")
#: What a LoRA is fused into.
DENOISERS = ("transformer", "unet")
#: How the names of a LoRA's tensors begin that are none of the denoiser's.
TEXT_LAYERS = ("text_encoder", "lora_te")


@dataclass(frozen=True)
class RecordedCalls:
    """The calls that a pipeline is calibrated with, as the options give them.

    Attributes:
        prompts: The file of prompts.
        class_labels: Labels with commas between them.
        components: What is quantized; empty is every denoiser.
        steps: Sampling steps.
        guidance: Guidance scale.
        size: Width x height.
        calls: Calls of the pipeline.
        seed: Seed of the first one.
    """

    prompts: Path | None
    class_labels: str | None
    components: Sequence[str]
    steps: int | None
    guidance: float | None
    size: str | None
    calls: int | None
    seed: int


def quantize_pipeline_folder(
    context: typer.Context,
    model: str | None,
    out: Path,
    config: QuantizationConfig,
    method: Preset | None,
    given: RecordedCalls,
    *,
    lora: Path | None,
    lora_scale: float,
    max_error: float | None,
) -> None:
    """Quantize a pipeline's denoisers and save the pipeline.

    Args:
        context: That of ``quantize``, whose options these are.
        model: The folder or id of the pipeline.
        out: The folder to write.
        config: What to quantize.
        method: The preset that it comes from.
        given: How the pipeline is called.
        lora: What is fused into the denoiser's weights.
        lora_scale: Its strength.
        max_error: The largest relative error that is accepted.

    Raises:
        ConfigError: Something in the options does not fit together or the pipeline.
        typer.BadParameter: An option has no effect here.
    """
    _refuse_options(context, method)
    prompts = None if given.prompts is None else read_prompts(given.prompts)
    labels = None if given.class_labels is None else parse_class_labels(given.class_labels)
    if prompts is not None and labels is not None:
        msg = "--prompts and --class-labels are for different pipelines: leave one of them out"
        raise ConfigError(msg)
    width, height = (None, None) if given.size is None else parse_size(given.size)
    call = PipelineCall(given.steps, given.guidance, width, height)
    arguments: dict[str, Any] = {**call.arguments(), **({} if labels is None else {"class_labels": labels})}
    check_components(model, given.components)
    _check_target(out)
    assert model is not None  # or check_components had refused it

    from tfmq_fx.data.lora import fuse_lora
    from tfmq_fx.diagnostics.comparison import float_bytes, path_bytes
    from tfmq_fx.diffusers.pipeline_quantization import quantize_pipeline

    stage("loading the pipeline")
    pipeline = load_float_pipeline(model)
    before = {name: float_bytes(part) for name, part in pipeline.components.items() if hasattr(part, "parameters")}
    if lora is not None:
        _warn_of_text_layers(lora)
        name = next((name for name in DENOISERS if getattr(pipeline, name, None) is not None), DENOISERS[0])
        stage(f"fusing {len(fuse_lora(getattr(pipeline, name), lora, lora_scale))} layers of {lora} into {name!r}")
    stage("running it with the float model, and quantizing what was seen")
    state = out.with_name(f".{out.name}.reconstruction")
    quantize_pipeline(
        pipeline,
        prompts,
        config,
        components=list(given.components) or None,
        steps=given.steps,
        calls=given.calls,
        seed=given.seed,
        directory=state if config.resolved_reconstruction is not None else None,
        max_error=max_error,
        finite=() if labels is None else ("class_labels",),
        **arguments,
    )
    stage("saving the pipeline")
    _save(pipeline, call, out)
    shutil.rmtree(state, ignore_errors=True)
    console().print(f"[bold green]{out}[/]: the pipeline, {size_text(path_bytes(out))}", soft_wrap=True)
    for name, part in pipeline.components.items():
        if (served := getattr(part, "served", None)) is not None:
            after = path_bytes(out / name)
            console().print(
                f"  {name}: {size_text(after)}, {after / before[name]:.2f} × the fp32 weights; compared with float: "
                f"{served.program.fidelity}",
                soft_wrap=True, markup=False, highlight=False,
            )  # fmt: skip


def _warn_of_text_layers(lora: Path) -> None:
    """Say that a LoRA's other half stays out."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora, "pt") as file:
            names = [name for name in file.keys() if name.startswith(TEXT_LAYERS)]  # noqa: SIM118
    except (OSError, SafetensorError):
        return  # fusing it says what is wrong
    if names:
        warnings.warn(
            f"{lora} has {len(names)} tensors for text encoders, which stay as they are: fuse those into the pipeline "
            "with diffusers (pipe.fuse_lora), and quantize what it saves",
            stacklevel=2,
        )


def _refuse_options(context: typer.Context, method: Preset | None) -> None:
    for name in WITHOUT_EFFECT:
        if is_given(context, name):
            msg = "it has no effect on a pipeline, whose timesteps are those that it visits: leave it out"
            raise typer.BadParameter(msg, ctx=context, param_hint=f"--{name.replace('_', '-')}")
    if method is not None and method.sampler != "uniform":
        msg = f"--preset {method.name} draws its timesteps ({method.sampler}); a pipeline visits its own: leave it out"
        raise ConfigError(msg)


def _check_target(out: Path) -> None:
    """A folder that this command wrote is replaced, anything else is kept."""
    if out.exists() and not (out / CALL_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        msg = f"{out} exists and is no pipeline that `quantize` wrote; choose another path"
        raise ConfigError(msg)


def _save(pipeline: Any, call: PipelineCall, out: Path) -> None:
    """Write the folder beside its place, then put it there."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        pipeline.save_pretrained(partial)
        call.write(partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
