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
    Samples,
    Seed,
    ServedTimesteps,
    TableSteps,
)

__all__ = ["sample"]


def sample(
    artefact: ArtefactOption,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    samples: Samples = 16,
    steps: TableSteps = None,
    unknown_timestep: ServedTimesteps = None,
    seed: Seed = 0,
    backend: BackendOption = "inductor",
    package: PackageOption = None,
) -> None:
    """Sample images with a quantized artefact."""
    import torch

    from tfmq_fx.cli.denoising import load_program, lower_program, sample_with_progress
    from tfmq_fx.data.model_inputs import sample_shape
    from tfmq_fx.diagnostics.comparison import check_image_path, image_grid

    check_image_path(out)
    program, count = load_program(artefact, steps, unknown_timestep)
    shape = sample_shape(program.interface.config, program.interface.model_class)
    denoiser = lower_program(program, backend, artefact, package)
    noise = torch.randn((samples, *shape), generator=torch.Generator().manual_seed(seed))
    images = sample_with_progress(denoiser, program.scheduler, count, noise, "sampling")
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid([(f"quantized, {count} steps", images)]).save(out)
    console().print(f"[bold green]{out}[/]: {samples} samples, {count} steps", soft_wrap=True)
    console().print(str(denoiser.report).splitlines()[0], soft_wrap=True, markup=False)
