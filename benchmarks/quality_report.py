"""Collect the cells of the quality benchmark into one JSON and one table."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["write_report"]


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Mean over seeds, and how far single seeds lie from it."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return text(mean)
    return f"{text(mean)} ± {text(max(abs(value - mean) for value in values))}"


COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], Callable[[float], str]]] = {
    "PSNR, dB": (lambda c: statistics.mean(c["psnr"]), lambda v: f"{v:.1f}"),
    "median": (lambda c: statistics.median(c["psnr"]), lambda v: f"{v:.1f}"),
    "worst image": (lambda c: min(c["psnr"]), lambda v: f"{v:.1f}"),
    "time block alone, dB": (
        lambda c: statistics.mean(c["psnr_time_only"]) if c["psnr_time_only"] else None,
        lambda v: f"{v:.1f}",
    ),
    "its median": (
        lambda c: statistics.median(c["psnr_time_only"]) if c["psnr_time_only"] else None,
        lambda v: f"{v:.1f}",
    ),
    "relative feature error": (lambda c: c["feature_error"], lambda v: f"{v:.4f}"),
    "feature cosine": (lambda c: (c.get("feature_cosine") or {}).get("mean"), lambda v: f"{v:.5f}"),
    "right t, schedule": (lambda c: c["mismatch"]["right"], lambda v: f"{v:.1%}"),
    "right t, all 1000": (
        lambda c: (c.get("mismatch_every_timestep") or {}).get("right"),
        lambda v: f"{v:.1%}",
    ),
    "deviation": (lambda c: c["deviation"][-1], lambda v: f"{v:.3f}"),
    "FD": (lambda c: c.get("fd"), lambda v: f"{v:.1f}"),
    "sFD": (lambda c: c.get("sfd"), lambda v: f"{v:.0f}"),
    "classifier score": (lambda c: c.get("classifier_score"), lambda v: f"{v:.2f}"),
    "agreement": (lambda c: c.get("agreement"), lambda v: f"{v:.1%}"),
    "CPU s": (lambda c: c["seconds"]["cpu"], lambda v: f"{v:.0f}"),
    "peak GB": (lambda c: c["peak_bytes"] / 1e9, lambda v: f"{v:.1f}"),
}
IMAGES = ("fd", "sfd", "classifier_score", "confidence", "agreement", "images", "steps")


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def write_report(work: Path, file: Path) -> None:
    """Print the table as Markdown too, and write the JSON.

    Args:
        work: The folder of the benchmark's cells.
        file: The JSON to write.
    """
    cells = _read(work / "cells")
    images = _read(work / "image-cells")
    by_cell = {(i["method"], i["bits"], i["seed"], i["steps"]): i for i in images}
    steps = sorted({i["steps"] for i in images})
    for cell in cells:
        cell.pop("units", None)
        for count in steps:
            found = by_cell.get((cell["method"], cell["bits"], cell["seed"], count))
            if found:
                cell.update({key: found[key] for key in IMAGES})
    floats = [i for i in images if i["method"] == "float"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["bits"], cell["method"]].append(cell)
    lines = [f"| {' | '.join(('bits', 'method', 'seeds', *COLUMNS))} |", "|" + "---|" * (3 + len(COLUMNS))]
    table = Table("bits", "method", "seeds", *COLUMNS)
    for original in floats:
        row = {"FD": original["fd"], "sFD": original["sfd"], "classifier score": original["classifier_score"]}
        shown = [COLUMNS[name][1](row[name]) if name in row else "" for name in COLUMNS]
        table.add_row("32", f"float, seed {original['seed']}, {original['steps']} steps", "1", *shown)
        lines.append(f"| 32 | float, seed {original['seed']} | 1 | {' | '.join(shown)} |")
    order = {bits: index for index, bits in enumerate(("W8A8", "W4A32", "W4A8", "W4A4"))}
    ranked = sorted(groups.items(), key=lambda item: (order[item[0][0]], -_mean_psnr(item[1])))
    for (bits, method), found in ranked:
        shown = [
            _spread([value for cell in found if (value := read(cell)) is not None], text)
            for read, text in COLUMNS.values()
        ]
        table.add_row(bits, method, str(len(found)), *shown)
        lines.append(f"| {bits} | {method} | {len(found)} | {' | '.join(shown)} |")
    Console(width=220).print(table)
    print("\n".join(lines))
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"date": datetime.now(UTC).date().isoformat(), "float": floats, "cells": cells}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _mean_psnr(cells: list[dict[str, Any]]) -> float:
    return statistics.mean(statistics.mean(cell["psnr"]) for cell in cells)
