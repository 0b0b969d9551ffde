"""``tfmq-fx compare``: float and quantized side by side: images, PSNR, speed, size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tfmq_fx.cli.compare_pipeline import compare_pipelines
from tfmq_fx.cli.console import console, size_text, stage
from tfmq_fx.cli.float_models import require_no_artefact
from tfmq_fx.cli.options import (
    ArtefactOption,
    BackendOption,
    Model,
    PackageOption,
    SampleCount,
    Seed,
    ServedTimesteps,
    TableSteps,
)
from tfmq_fx.cli.pipeline_call import read_prompts
from tfmq_fx.cli.pipeline_options import ClassLabels, Guidance, PromptsFile, SchedulerOption, Size
from tfmq_fx.cli.sample_pipeline import PipelineRun, refuse_pipeline_options
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tfmq_fx.lowering.report.report import LoweringReport
    from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["compare"]

#: Batch sizes whose step is timed.
TIMED_BATCHES = (1, 4)
#: Layers that the terminal lists for one reason; the JSON has all of them.
SHOWN_LAYERS = 4


def compare(
    context: typer.Context,
    artefact: ArtefactOption,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="The PNG to write: float | quantized.")] = Path("comparison.png"),
    samples: SampleCount = None,
    steps: TableSteps = None,
    unknown_timestep: ServedTimesteps = None,
    prompts: PromptsFile = None,
    class_labels: ClassLabels = None,
    guidance: Guidance = None,
    size: Size = None,
    scheduler: SchedulerOption = None,
    rounds: Annotated[int, typer.Option(min=0, help="Timed calls of each model; 0 leaves the speed out.")] = 20,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="The JSON to write.  [default: the PNG's path with .json]", show_default=False),
    ] = None,
    seed: Seed = 0,
    backend: BackendOption = "inductor",
    package: PackageOption = None,
) -> None:
    """Compare a quantized artefact with its float model, from the same noise."""
    import torch

    from tfmq_fx.cli.denoising import load_program, lower_program, sample_with_progress
    from tfmq_fx.cli.pages import write_comparison_page
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.data.model_inputs import sample_shape
    from tfmq_fx.diagnostics.comparison import (
        check_image_path,
        ddim_scheduler,
        float_bytes,
        image_grid,
        path_bytes,
        psnr,
    )

    check_image_path(out)
    require_no_artefact(model)
    json_file = json_file or out.with_suffix(".json")
    if refuse_pipeline_options(context, artefact):
        run = PipelineRun.of_options(
            context, artefact, prompts=[] if prompts is None else read_prompts(prompts), class_labels=class_labels,
            steps=steps, guidance=guidance, size=size, scheduler=scheduler, samples=samples, seed=seed,
        )  # fmt: skip
        compare_pipelines(run, model, artefact, backend, out, json_file)
        return
    samples = samples or 16
    program, count = load_program(artefact, steps, unknown_timestep)
    stage("loading the float model")
    module, _ = load_model(model)
    _check_same_model(program, module, artefact)
    shape = sample_shape(program.interface.config, type(module).__name__)
    denoiser = lower_program(program, backend, artefact, package)

    noise = torch.randn((samples, *shape), generator=torch.Generator().manual_seed(seed))
    float_images = sample_with_progress(module, program.scheduler, count, noise, "sampling, float")
    images = sample_with_progress(denoiser, program.scheduler, count, noise, "sampling, quantized")
    decibels = psnr(float_images, images)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = image_grid([(f"float, {count} steps", float_images), (f"quantized, {count} steps", images)])
    picture.save(out)
    timestep = ddim_scheduler(program.scheduler, count).timesteps[0]
    speed = _time_steps(module, denoiser, shape, timestep, rounds) if rounds else []
    result: dict[str, Any] = {
        "samples": samples,
        "steps": count,
        "seed": seed,
        "backend": backend,
        "psnr": {
            "mean": _finite(decibels.mean().item()),
            "min": _finite(decibels.min().item()),
            "each": [_finite(value) for value in decibels.tolist()],
        },
        "speed": speed,
        "bytes": {"float32_weights": float_bytes(module), "artefact": path_bytes(artefact)},
        "lowering": denoiser.report.to_dict(),
        "config": program.config.to_dict(),
        "machine": _machine(),
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    table, page = _table(decibels, result), out.with_suffix(".html")
    write_comparison_page(page, picture, decibels, [table], [denoiser.report])
    console().print(table)
    console().print(_report_tree(denoiser.report))
    console().print(f"[bold green]{out}[/], [bold green]{page}[/], [bold green]{json_file}[/]", soft_wrap=True)


def _check_same_model(program: QuantizedProgram, module: nn.Module, artefact: Path) -> None:
    """Compare the configurations; weights that differ show in the PSNR.

    Raises:
        ConfigError: The artefact was made from another model.
    """
    from tfmq_fx.frontend.plain_config import plain_config

    expected = {"model class": type(module).__name__, **_as_json(plain_config(module))}
    actual = {"model class": program.interface.model_class, **_as_json(program.interface.config)}
    for name in expected:
        if expected[name] != actual.get(name):
            msg = (
                f"{artefact} was made from another model: its {name} is {actual.get(name)!r}, "
                f"this model's {expected[name]!r}; name the model that it was made from"
            )
            raise ConfigError(msg)


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration as JSON keeps it, without what only tells where it was loaded from."""
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    values: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return values


def _time_steps(
    module: nn.Module, denoiser: Any, shape: tuple[int, ...], timestep: Tensor, rounds: int
) -> list[dict[str, Any]]:
    """Time one denoising step of the compiled float model and of the quantized one, in turns."""
    import torch

    from tfmq_fx.diagnostics.comparison import Latency, interleaved_latency

    stage("compiling the float model, and timing both in turns")
    compiled = torch.compile(module)
    measurements = []
    with torch.no_grad():
        for batch in TIMED_BATCHES:
            x = torch.randn(batch, *shape)
            runs = {"float": partial(compiled, x, timestep), "quantized": partial(denoiser, x, timestep)}
            seconds = interleaved_latency(runs, rounds)
            latency = {name: Latency.of(values) for name, values in seconds.items()}
            ratio = latency["float"].median / latency["quantized"].median
            measurements.append({"batch": batch, "ratio": ratio, "seconds": seconds,
                                 **{name: vars(value) for name, value in latency.items()}})  # fmt: skip
    return measurements


def _finite(value: float) -> float | None:
    """JSON has no infinity; equal images have no finite PSNR."""
    return value if math.isfinite(value) else None


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch

    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _table(decibels: Tensor, result: dict[str, Any]) -> Table:
    from tfmq_fx.diagnostics.comparison import Latency

    table = Table("", "float", "quantized", "", title="float | quantized", title_justify="left")
    table.add_row("PSNR, same noise", "", f"mean {decibels.mean():.1f} dB", f"min {decibels.min():.1f} dB")
    sizes = result["bytes"]
    before, after = sizes["float32_weights"], sizes["artefact"]
    table.add_row("size", size_text(before), size_text(after), f"{after / before:.2f} ×")
    for entry in result["speed"]:
        table.add_row(
            f"one step, batch {entry['batch']}",
            str(Latency(**entry["float"])),
            str(Latency(**entry["quantized"])),
            f"{entry['ratio']:.2f} × the speed",
        )
    return table


def _report_tree(report: LoweringReport) -> Tree:
    """The report's summary, and what stayed float, gathered by reason; the JSON has every layer."""
    tree = Tree(Text(str(report).splitlines()[0]))
    by_reason: dict[str, list[str]] = {}
    for entry in report.entries:
        if entry.kernel == "float":
            by_reason.setdefault(entry.reason, []).append(f"{entry.name} ({entry.operator})")
    for reason, layers in by_reason.items():
        branch = tree.add(Text(f"{len(layers)} in float: {reason}"))
        for layer in layers[:SHOWN_LAYERS]:
            branch.add(Text(layer, style="dim"))
        if len(layers) > SHOWN_LAYERS:
            branch.add(Text(f"… {len(layers) - SHOWN_LAYERS} more", style="dim"))
    return tree
