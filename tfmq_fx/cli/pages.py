"""What the pages of ``compare`` and ``diagnose`` show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_fx.diagnostics.page import Bar, Bars, Grid, Part, grid_of, picture_of, render_page

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table
    from torch import Tensor

    from tfmq_fx.lowering.report.report import LoweringReport

__all__ = ["report_parts", "write_comparison_page", "write_diagnosis_page"]

#: Timesteps that are listed one by one; of more, evenly spaced ones.
MOST_TIMESTEPS = 60


def write_comparison_page(
    path: Path, picture: Image.Image, decibels: Tensor, tables: Sequence[Table], reports: Sequence[LoweringReport]
) -> None:
    """Write the page of a comparison.

    Args:
        path: The HTML file.
        picture: Float and quantized images side by side.
        decibels: PSNR of each pair, ``[N]``.
        tables: What the terminal shows too.
        reports: What runs where, for each model that was quantized.
    """
    each = [Bar(f"image {index}", value, f"{value:.1f} dB") for index, value in enumerate(decibels.tolist())]
    parts: list[Part] = [
        picture_of("Float and quantized, from the same noise", picture),
        *(grid_of(table) for table in tables),
        Bars("PSNR by image", tuple(each)),
        *(part for report in reports for part in report_parts(report)),
    ]
    _write(path, "Float and quantized", parts)


def report_parts(report: LoweringReport) -> list[Part]:
    """What runs on which kernels and why, layer by layer, and the error of each timestep."""
    summary = str(report).splitlines()
    total = sum(entry.multiply_adds for entry in report.entries) or 1
    layers = [
        Bar(
            f"{entry.name} ({entry.operator})",
            entry.multiply_adds,
            f"{100 * entry.multiply_adds / total:.1f} %, {entry.kernel}{': ' if entry.reason else ''}{entry.reason}",
            muted=entry.kernel != "integer",
        )
        for entry in report.entries
    ]
    parts: list[Part] = [Grid("Kernels", (), tuple((line.strip(),) for line in summary if "  float: " not in line))]
    if report.fidelity is not None:
        found = report.fidelity.timesteps
        shown = found[:: -(-len(found) // MOST_TIMESTEPS)] if found else found
        bars = tuple(
            Bar("all" if entry.timestep is None else f"{entry.timestep:g}", entry.error, f"{entry.error:.2g}")
            for entry in shown
        )
        parts.append(Bars("Relative error of the prediction by timestep", bars))
    parts.append(Bars("Multiply-adds by layer", tuple(layers), "Blue: integer kernels. Grey: float, and why."))
    return parts


def write_diagnosis_page(path: Path, tables: Sequence[Table], pictures: Sequence[Path]) -> None:
    """Write the page of a diagnosis.

    Args:
        path: The HTML file.
        tables: What the terminal shows too.
        pictures: The PNG files that were drawn; they are taken into the page.
    """
    drawn = [picture_of(picture.stem.replace("-", " "), picture.read_bytes()) for picture in pictures]
    _write(path, "What quantization lost", [*(grid_of(table) for table in tables), *drawn])


def _write(path: Path, title: str, parts: Sequence[Part]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(title, parts), encoding="utf-8")
