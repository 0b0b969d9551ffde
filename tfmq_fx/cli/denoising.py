"""From an artefact to a denoiser and the schedule that it serves, for the commands that sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfmq_fx.cli.console import stage
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tfmq_fx.config.choices import UnknownTimestep
    from tfmq_fx.lowering.run.denoiser import Denoiser
    from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["load_program", "lower_program", "sample_with_progress"]


def load_program(
    artefact: Path, steps: int | None, unknown: UnknownTimestep | None = None
) -> tuple[QuantizedProgram, int]:
    """The program, and the sampling steps: those given, else as many as its table has rows.

    Args:
        artefact: Its folder.
        steps: Sampling steps.
        unknown: What a timestep outside its table does; None leaves it as it was quantized.

    Raises:
        ArtefactError: The artefact cannot be loaded.
        ConfigError: It does not say which noise schedule it belongs to, or the steps are not possible with it.
        TimestepError: The steps visit a timestep outside the table, and such are refused.
    """
    from tfmq_fx.artefact.load import load
    from tfmq_fx.diagnostics.comparison import ddim_scheduler
    from tfmq_fx.passes.support.timestep_row import check_timesteps
    from tfmq_fx.quantization.unknown_timesteps import with_unknown_timestep

    program = with_unknown_timestep(load(artefact), unknown)
    if not program.scheduler:
        msg = f"{artefact} does not name its noise schedule; set program.scheduler = dict(scheduler.config), then save"
        raise ConfigError(msg)
    timesteps = program.timesteps
    count = steps or (50 if timesteps is None else len(timesteps))
    # Whatever is wrong with the steps is found before the minutes of lowering and sampling.
    visited = ddim_scheduler(program.scheduler, count).timesteps
    has_table_only = program.config.unknown_timestep == "extend" and program.config.tabulates
    if timesteps is not None and (has_table_only or program.config.unknown_timestep == "error"):
        check_timesteps(visited, timesteps)
    return program, count


def lower_program(program: QuantizedProgram, backend: str, artefact: Path, package: Path | None = None) -> Denoiser:
    """Lower for ``backend``; a package that is younger than its artefact is used again.

    Raises:
        LoweringError: The program cannot be lowered.
        ArtefactError: The package cannot be loaded.
    """
    from tfmq_fx.artefact.layout import MANIFEST
    from tfmq_fx.lowering.backends.registry import find_backend
    from tfmq_fx.lowering.lower import load_denoiser, lower

    suffix = find_backend(backend).package_suffix
    if suffix is None:
        stage(f"lowering ({backend})")
        return lower(program, backend=backend, path=package)
    package = package or artefact.parent / f"{artefact.name}{suffix}"
    if package.exists() and package.stat().st_mtime > (artefact / MANIFEST).stat().st_mtime:
        stage(f"loading the compiled package {package}")
        return load_denoiser(package, unknown_timestep=program.config.unknown_timestep)
    stage(f"compiling to {package}")
    return lower(program, backend=backend, path=package)


def sample_with_progress(denoiser: Any, scheduler: Any, steps: int, noise: Tensor, label: str) -> Tensor:
    """:func:`tfmq_fx.diagnostics.comparison.sample_images` under a progress bar."""
    from rich.progress import Progress

    from tfmq_fx.config.progress import draws_progress, progress_console
    from tfmq_fx.diagnostics.comparison import sample_images

    with Progress(console=progress_console(), disable=not draws_progress(), transient=True) as progress:
        task = progress.add_task(label, total=steps)
        return sample_images(denoiser, scheduler, steps=steps, noise=noise, on_step=lambda: progress.advance(task))
