"""Where the quality benchmark keeps what it has measured: one file a cell, a folder a model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["FLOAT", "ROOT", "WORK", "cell_name", "has_cell", "kept", "write_json"]

ROOT = Path(__file__).resolve().parent.parent
#: A folder for each model.
WORK = ROOT / "runs" / "quality"
FLOAT = "float"


def cell_name(method: str, bits: str, seed: int) -> str:
    """A file name for a cell."""
    return f"{bits}-{method.replace(', ', '-').replace(' + ', '+').replace(' ', '-')}-s{seed}"


def has_cell(work: Path, method: str, bits: str, seed: int, samples: int) -> bool:
    """Whether a cell is measured, on that many samples.

    Args:
        work: The folder of the cell's model.
        method: The cell's method.
        bits: Its widths.
        seed: Its seed.
        samples: Trajectories that are compared.
    """
    file = work / "cells" / f"{cell_name(method, bits, seed)}.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["samples"] == samples


def write_json(file: Path, content: Any) -> None:
    """Write a complete file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def kept(file: Path, make: Any) -> Any:
    """A tensor structure from a file, made on the first call."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        torch.save(make(), part)
        part.replace(file)
    return torch.load(file, weights_only=False)
