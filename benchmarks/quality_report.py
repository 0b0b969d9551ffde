"""Collect the cells of the quality benchmark into one JSON, and one table a model."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from quality_cells import FLOAT, write_json
from quality_methods import BITS
from rich.console import Console
from rich.table import Table

__all__ = ["REFERENCE", "SAMPLES", "merged", "paired", "rows", "write_report"]

#: Trajectories of a whole cell; one with others was a try and is not recorded.
SAMPLES = 16
#: What the other methods of the same model and widths are compared with, image by image.
REFERENCE = "BRECQ"

Cell = dict[str, Any]
Read = Callable[[Cell], float | None]
Text = Callable[[float], str]


def spread(values: Sequence[float], text: Text) -> str:
    """Mean over seeds, and how far single seeds lie from it; the latter is left out where it is nothing."""
    if not values:
        return ""
    mean = statistics.mean(values)
    far = text(max(abs(value - mean) for value in values))
    return text(mean) if len(values) == 1 or far == text(0.0) else f"{text(mean)} ± {far}"


def paired(cells: Sequence[Cell], references: Sequence[Cell]) -> tuple[float, float] | None:
    """Mean difference in PSNR to the reference over all images of all common seeds, and its standard error.

    Images of the same noise are compared. What they share within a seed, calibration data and integers, is not in the
    error.
    """
    other = {cell["seed"]: cell["psnr"] for cell in references}
    both = [(cell["psnr"], other[cell["seed"]]) for cell in cells if cell["seed"] in other]
    differences = [a - b for own, reference in both for a, b in zip(own, reference, strict=True)]
    if len(differences) < 2:
        return None
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def of_seeds(read: Read, text: Text) -> Callable[[Sequence[Cell]], str]:
    """A column of means over the seeds."""
    return lambda cells: spread([value for cell in cells if (value := read(cell)) is not None], text)


def decibels(value: float) -> str:
    """One digit is what the seeds allow."""
    return f"{value:.1f}"


def percent(value: float) -> str:
    """A share."""
    return f"{value:.1%}"


COLUMNS: dict[str, Callable[[Sequence[Cell]], str]] = {
    "seeds": lambda cells: str(len(cells)),
    "PSNR, dB": of_seeds(lambda c: statistics.mean(c["psnr"]), decibels),
    "worst seed": lambda cells: decibels(min(statistics.mean(cell["psnr"]) for cell in cells)),
    "worst image": lambda cells: decibels(min(min(cell["psnr"]) for cell in cells)),
    "median": of_seeds(lambda c: statistics.median(c["psnr"]), decibels),
    "time block alone, dB": of_seeds(
        lambda c: statistics.mean(c["psnr_time_only"]) if c["psnr_time_only"] else None, decibels
    ),
    "relative feature error": of_seeds(lambda c: c["feature_error"], lambda v: f"{v:.4f}"),
    "feature cosine": of_seeds(lambda c: (c.get("feature_cosine") or {}).get("mean"), lambda v: f"{v:.5f}"),
    "right t, schedule": of_seeds(lambda c: c["mismatch"]["right"], percent),
    "right t, all 1,000": of_seeds(lambda c: (c.get("mismatch_every_timestep") or {}).get("right"), percent),
    "final deviation": of_seeds(lambda c: c["deviation"][-1], lambda v: f"{v:.3f}"),
    "CPU s": of_seeds(lambda c: c["seconds"]["cpu"], lambda v: f"{v:.0f}"),
    "peak GB": of_seeds(lambda c: c["peak_bytes"] / 1e9, decibels),
}
#: Of the bundled model, where they are measured: in a table of their own.
IMAGE_COLUMNS: dict[str, Callable[[Sequence[Cell]], str]] = {
    "FD": of_seeds(lambda c: c.get("fd"), decibels),
    "sFD": of_seeds(lambda c: c.get("sfd"), lambda v: f"{v:.0f}"),
    "classifier score": of_seeds(lambda c: c.get("classifier_score"), lambda v: f"{v:.2f}"),
    "agreement": of_seeds(lambda c: c.get("agreement"), percent),
}
IMAGES = ("fd", "sfd", "classifier_score", "confidence", "agreement", "images", "steps")
PAIRED = f"to {REFERENCE}, paired"


def _read(folders: Iterable[Path]) -> list[Cell]:
    return [
        json.loads(file.read_text(encoding="utf-8")) for folder in folders for file in sorted(folder.glob("*.json"))
    ]


def merged(recorded: Iterable[Cell], measured: Iterable[Cell], names: Sequence[str]) -> list[Cell]:
    """What is recorded, with what is measured since in its place or behind it.

    Args:
        recorded: Cells of the file.
        measured: Cells of the benchmark's folder.
        names: The entries that say which cell it is.
    """
    found = {tuple(cell[name] for name in names): cell for cell in recorded}
    found.update({tuple(cell[name] for name in names): cell for cell in measured})
    return list(found.values())


def rows(cells: Iterable[Cell]) -> list[dict[str, str]]:
    """The table of one model, best method first within its widths; columns in which nothing stands are left out."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell["bits"], cell["method"]].append(cell)

    def rank(key: tuple[str, str]) -> tuple[int, float]:
        return list(BITS).index(key[0]), -statistics.mean(statistics.mean(cell["psnr"]) for cell in groups[key])

    made = []
    for bits, method in sorted(groups, key=rank):
        found = groups[bits, method]
        row = {"bits": bits, "method": method}
        for name, column in COLUMNS.items():
            row[name] = column(found)
            if name == "worst image":
                difference = None if method == REFERENCE else paired(found, groups.get((bits, REFERENCE), []))
                row[PAIRED] = "" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}"
        made.append(row)
    return _without_empty(made)


def image_rows(cells: Iterable[Cell], floats: Sequence[Cell]) -> list[dict[str, str]]:
    """The Fréchet distances of one model; empty where none are measured."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    if floats:
        groups["32", FLOAT] = list(floats)
    for cell in cells:
        if cell.get("fd") is not None:
            groups[cell["bits"], cell["method"]].append(cell)
    return [
        {"bits": bits, "method": method, "seeds": str(len(found))}
        | {name: column(found) for name, column in IMAGE_COLUMNS.items()}
        for (bits, method), found in groups.items()
    ]


def _without_empty(made: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: text for name, text in row.items() if any(other[name] for other in made)} for row in made]


def show(title: str, made: Sequence[dict[str, str]]) -> None:
    """Print rows as a table, and as Markdown."""
    if not made:
        return
    table = Table(*made[0], title=title)
    for row in made:
        table.add_row(*row.values())
    Console(width=220).print(table)
    lines = [f"| {' | '.join(row.values())} |" for row in made]
    print(f"\n### {title}\n", f"| {' | '.join(made[0])} |", "|" + "---|" * len(made[0]), *lines, "", sep="\n")


def write_report(work: Path, file: Path, models: Sequence[str]) -> None:
    """Print a table for each model, and write the JSON: what is recorded there, and what was measured since.

    Args:
        work: The folder of the benchmark, one in it for each model.
        file: The JSON to read and write.
        models: The models whose tables are printed.
    """
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"float": [], "cells": []}
    measured = _read(sorted(work.glob("*/cells")))
    images = _read(sorted(work.glob("*/image-cells")))
    tries = [cell for cell in measured if cell["samples"] != SAMPLES]
    if tries:
        print(f"{len(tries)} cells of other than {SAMPLES} images are not recorded")
    by_cell = {(i["model"], i["method"], i["bits"], i["seed"]): i for i in sorted(images, key=lambda i: i["steps"])}
    for cell in measured:
        cell.pop("units", None)
        found = by_cell.get((cell["model"], cell["method"], cell["bits"], cell["seed"]), {})
        cell.update({key: found[key] for key in IMAGES if key in found})
    whole = [cell for cell in measured if cell not in tries]
    content = {
        "float": merged(recorded["float"], [i for i in images if i["method"] == FLOAT], ("model", "seed", "steps")),
        "cells": merged(recorded["cells"], whole, ("model", "bits", "method", "seed")),
    }
    for model in models:
        own = [cell for cell in content["cells"] if cell["model"] == model]
        show(model, rows(own))
        show(f"{model}, images", image_rows(own, [i for i in content["float"] if i["model"] == model]))
        if not own:
            print(f"nothing is measured of {model}")
    write_json(file, content)
