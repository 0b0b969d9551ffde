"""``tfmq-fx compare`` for a quantized pipeline: the float pipeline's images beside its own, from the same noise."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from tfmq_fx.cli.console import console, size_text, stage
from tfmq_fx.cli.pipelines import check_components, load_float_pipeline
from tfmq_fx.cli.sample_pipeline import PipelineRun

__all__ = ["compare_pipelines"]


def compare_pipelines(
    run: PipelineRun, model: str | None, artefact: Path, backend: str, out: Path, json_file: Path
) -> None:
    """Run both, and write the picture and the figures.

    Args:
        run: What both are given.
        model: The float pipeline's folder or id.
        artefact: The quantized one's folder.
        backend: What its denoiser runs on.
        out: The PNG.
        json_file: The JSON.

    Raises:
        ConfigError: MODEL is no pipeline.
        CaptureError: One of them cannot be loaded.
    """
    from tfmq_fx.cli.pages import write_comparison_page
    from tfmq_fx.diagnostics.comparison import image_grid, path_bytes, psnr

    check_components(model, ())
    assert model is not None  # or it had been refused
    stage("loading the float pipeline")
    wanted = run.images(load_float_pipeline(model), "sampling, float")
    images, reports = run.quantized(artefact, backend)
    decibels = psnr(wanted, images)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = image_grid([("float", wanted), ("quantized", images)])
    picture.save(out)
    each = [value if math.isfinite(value) else None for value in decibels.tolist()]
    result = {
        "prompts": list(run.prompts),
        "class_labels": run.class_labels,
        "call": asdict(run.call),
        "scheduler": run.scheduler,
        "seed": run.seed,
        "backend": backend,
        "psnr": each,
        "bytes": {"artefact": path_bytes(artefact)},
        "lowering": [report.to_dict() for report in reports],
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table("", "float | quantized", title="same prompts, same noise", title_justify="left")
    table.add_row("PSNR", f"mean {decibels.mean():.1f} dB, min {decibels.min():.1f} dB")
    table.add_row("size of the quantized pipeline", size_text(path_bytes(artefact)))
    console().print(table)
    for report in reports:
        console().print(str(report).splitlines()[0], soft_wrap=True, markup=False)
    page = out.with_suffix(".html")
    write_comparison_page(page, picture, decibels, [table], reports)
    console().print(f"[bold green]{out}[/], [bold green]{page}[/], [bold green]{json_file}[/]", soft_wrap=True)
