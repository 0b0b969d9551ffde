"""``tfmq-fx diagnose``: what quantized artefacts lost against their float model, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfmq_fx.cli.console import console, stage
from tfmq_fx.cli.float_models import require_no_artefact
from tfmq_fx.cli.options import Model, Samples, Seed, ServedTimesteps, TableSteps
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from tfmq_fx.diagnostics import Diagnosis

__all__ = ["diagnose"]

#: Dots per inch: pictures of ten inches, read at 1200 pixels.
DOTS = 160


def diagnose(
    artefact: Annotated[
        list[Path], typer.Option("--artefact", help="A folder that `quantize` wrote. May be repeated, to compare.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write: diagnosis.html and .json, pictures.")],
    model: Model = None,
    samples: Samples = 8,
    steps: TableSteps = None,
    unknown_timestep: ServedTimesteps = None,
    every_timestep: Annotated[
        bool,
        typer.Option("--every-timestep", help="Compare temporal features at all training timesteps, not the table's."),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Measure what quantized artefacts lost against their float model, and where."""
    from rich.progress import Progress

    from tfmq_fx import diagnostics
    from tfmq_fx.cli.denoising import load_program
    from tfmq_fx.cli.example_inputs import unconditional_inputs
    from tfmq_fx.cli.pages import write_diagnosis_page
    from tfmq_fx.config.progress import draws_progress, progress_console
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.frontend.capture import capture

    # Everything that can be wrong with the command is found before the minutes of sampling.
    _check_no_artefact(out)
    require_no_artefact(model)
    named = zip(_labels(artefact), artefact, strict=True)
    loaded = [(label, *load_program(path, steps, unknown_timestep)) for label, path in named]
    stage("loading the float model and capturing its graph")
    module, _ = load_model(model)
    captured = capture(module, example_kwargs=unconditional_inputs(module))
    for (_, program, _), path in zip(loaded, artefact, strict=True):
        diagnostics.check_same_model(captured, program, str(path))
    out.mkdir(parents=True, exist_ok=True)

    diagnoses = {}
    for label, program, count in loaded:
        stage(f"diagnosing {label}")
        horizon = int(program.scheduler.get("num_train_timesteps", 1000))
        with Progress(console=progress_console(), disable=not draws_progress(), transient=True) as bar:
            diagnoses[label] = diagnostics.diagnose(
                captured,
                program,
                label=label,
                samples=samples,
                steps=count,
                timesteps=range(horizon) if every_timestep else None,
                seed=seed,
                progress=_progress_callback(bar),
            )
    result = {"samples": samples, "seed": seed, "diagnoses": [diagnosis.to_dict() for diagnosis in diagnoses.values()]}
    text = json.dumps(result, allow_nan=False) + "\n"
    (out / "diagnosis.json").write_text(text, encoding="utf-8")
    pictures = _draw(diagnoses, out)
    tables = [diagnostics.comparison_table(list(diagnoses.values()))]
    tables += [table for diagnosis in diagnoses.values() for table in diagnosis.tables()[1:]]
    write_diagnosis_page(out / "diagnosis.html", tables, pictures)
    written = [out / "diagnosis.html", out / "diagnosis.json", *pictures]
    for table in tables:
        console().print(table)
    console().print(", ".join(f"[bold green]{path}[/]" for path in written), soft_wrap=True)


def _check_no_artefact(out: Path) -> None:
    """Keep pictures out of a folder whose content is checked on loading.

    Raises:
        ConfigError: The folder is an artefact.
    """
    from tfmq_fx.artefact.layout import is_artefact

    if is_artefact(out):
        msg = f"{out} is an artefact; choose another folder for its diagnosis"
        raise ConfigError(msg)


def _labels(paths: list[Path]) -> list[str]:
    """The folders' names, or their paths where two have the same name.

    Raises:
        ConfigError: One artefact is named twice.
    """
    duplicates = [path for index, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:index]]]
    if duplicates:
        msg = f"{duplicates[0]} is named twice; name each artefact once"
        raise ConfigError(msg)
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _progress_callback(bar: Progress) -> Callable[[str, int, int], None]:
    """A callback that gives every section its own line."""
    tasks: dict[str, Any] = {}

    def advance(section: str, done: int, total: int) -> None:
        if section not in tasks:
            tasks[section] = bar.add_task(section, total=total)
        bar.update(tasks[section], completed=done)

    return advance


def _draw(diagnoses: dict[str, Diagnosis], out: Path) -> list[Path]:
    """Write the pictures whose sections at least one diagnosis has."""
    from functools import partial

    from tfmq_fx import diagnostics

    pictures: tuple[tuple[str, str, Any], ...] = (
        ("mismatch", "mismatch", diagnostics.mismatch_heatmap),
        ("nearest", "nearest", partial(diagnostics.mismatch_heatmap, measure="distance")),
        ("feature-error", "features", diagnostics.feature_error_plot),
        ("deviation", "trajectory", diagnostics.deviation_curve),
        ("layers", "layers", diagnostics.layer_error_plot),
    )
    written = []
    for name, section, draw in pictures:
        if all(getattr(diagnosis, section) is None for diagnosis in diagnoses.values()):
            continue
        written.append(out / f"{name}.png")
        draw(diagnoses).savefig(written[-1], dpi=DOTS)
    return written
