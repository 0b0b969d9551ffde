"""``tfmq-fx sample``: images from an artefact alone, without the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfmq_fx.cli.console import console
from tfmq_fx.cli.options import (
    ArtefactOption,
    BackendOption,
    PackageOption,
    SampleCount,
    Seed,
    ServedTimesteps,
    TableSteps,
)
from tfmq_fx.cli.pipeline_call import read_prompts
from tfmq_fx.cli.pipeline_options import ClassLabels, Guidance, PromptOption, PromptsFile, SchedulerOption, Size
from tfmq_fx.cli.sample_pipeline import PipelineRun, refuse_pipeline_options

__all__ = ["sample"]


def sample(
    context: typer.Context,
    artefact: ArtefactOption,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    samples: SampleCount = None,
    steps: TableSteps = None,
    unknown_timestep: ServedTimesteps = None,
    prompt: PromptOption = [],  # noqa: B006  (typer shows the default; nothing changes it)
    prompts: PromptsFile = None,
    class_labels: ClassLabels = None,
    guidance: Guidance = None,
    size: Size = None,
    scheduler: SchedulerOption = None,
    seed: Seed = 0,
    backend: BackendOption = "inductor",
    package: PackageOption = None,
) -> None:
    """Sample images with a quantized artefact, or with a pipeline that was quantized."""
    import torch

    from tfmq_fx.cli.denoising import load_program, lower_program, sample_with_progress
    from tfmq_fx.data.model_inputs import sample_shape
    from tfmq_fx.diagnostics.comparison import check_image_path, image_grid

    check_image_path(out)
    if refuse_pipeline_options(context, artefact):
        given = [*prompt, *([] if prompts is None else read_prompts(prompts))]
        run = PipelineRun.of_options(
            context, artefact, prompts=given, class_labels=class_labels, steps=steps, guidance=guidance, size=size,
            scheduler=scheduler, samples=samples, seed=seed,
        )  # fmt: skip
        images, reports = run.quantized(artefact, backend)
        out.parent.mkdir(parents=True, exist_ok=True)
        image_grid([("quantized", images)]).save(out)
        console().print(f"[bold green]{out}[/]: {len(images)} images", soft_wrap=True)
        for report in reports:
            console().print(str(report).splitlines()[0], soft_wrap=True, markup=False)
        return
    samples = samples or 16
    program, count = load_program(artefact, steps, unknown_timestep)
    shape = sample_shape(program.interface.config, program.interface.model_class)
    denoiser = lower_program(program, backend, artefact, package)
    noise = torch.randn((samples, *shape), generator=torch.Generator().manual_seed(seed))
    images = sample_with_progress(denoiser, program.scheduler, count, noise, "sampling")
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid([(f"quantized, {count} steps", images)]).save(out)
    console().print(f"[bold green]{out}[/]: {samples} samples, {count} steps", soft_wrap=True)
    console().print(str(denoiser.report).splitlines()[0], soft_wrap=True, markup=False)
