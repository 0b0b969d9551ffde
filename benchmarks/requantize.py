"""Other weights in a quantized architecture: what requantizing costs, and its error beside a fresh calibration.

    python benchmarks/requantize.py                # bundled (2.7 M parameters), cifar (35.7 M), sd15 (860 M)
    python benchmarks/requantize.py --unets sd15 --rows 8
    python benchmarks/requantize.py --report

A UNet is quantized to W8A8 on ``--rows`` rows and saved. Its weights are then changed as a fine-tune with a LoRA
changes them: every weight by normal noise of 2 % of its standard deviation, and the projections of attention by a
product of rank 16 of a tenth of their norm. These are quantized three times, each in a process of its own: with the
ranges of the artefact, without and with two of the rows as batches of the check, and with a calibration of its own on
the rows. All are held against the changed float model on the same held-out row.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from coverage_row import draw_zeros, processor_time, relative_error
from timing.machine import machine
from timing.process import BENCHMARKS, processor_seconds
from timing.unets import UNETS
from torch import nn

import tfmq_fx

RESULTS = BENCHMARKS / "results" / "requantize.json"
WAYS = ("artefact", "requantized", "checked", "fresh")
#: Batches of the check, where it has some.
CHECKED = 2
#: How much of every weight changes, and how much of the projections of attention, by a product of this rank.
NOISE, LORA, RANK = 0.02, 0.1, 16
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@torch.no_grad()
def change_weights(model: nn.Module) -> None:
    """Change the weights as a fine-tune with a LoRA changes them."""
    generator = torch.Generator().manual_seed(9)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            continue
        weight += torch.randn(weight.shape, generator=generator) * (NOISE * weight.std())
        if name.endswith(PROJECTIONS):
            product = torch.randn(len(weight), RANK, generator=generator) @ torch.randn(
                RANK, weight.shape[1], generator=generator
            )
            weight += product * (LORA * weight.norm() / product.norm())


class Stages(logging.Handler):
    """Notes when each stage begins, which the library logs, and the peak of memory up to there."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, float, float, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note it."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.marks.append((record.getMessage(), time.perf_counter(), processor_time(), peak))

    def stages(self) -> dict[str, dict[str, float]]:
        """By stage, its seconds and the peak at its end."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {a[0]: {"seconds": b[1] - a[1], "cpu_seconds": b[2] - a[2], "peak_bytes": b[3]} for a, b in pairs}


def measure(name: str, way: str, rows: int, artefact: Path) -> dict[str, Any]:
    """Quantize one UNet in one way, and the relative error of what comes out.

    Args:
        name: Of the UNet.
        way: One of :data:`WAYS`; the first writes the artefact that two others start from.
        rows: Calibration batches of one row.
        artefact: Its folder.
    """
    unet, schedule = UNETS[name], UNETS[name].schedule()
    model = unet.build()
    draw_zeros(model)
    if way != "artefact":
        change_weights(model)
    spread = torch.linspace(0, len(schedule.timesteps) - 1, rows + 1).long()
    batches = [{**unet.normal(1, 100 + at), "timestep": schedule.timesteps[spread[at], None]} for at in range(rows + 1)]
    test = batches.pop(rows // 2)
    with torch.no_grad():
        original = model(**test).sample
    noted, others = Stages(), processor_seconds()
    logger = logging.getLogger("tfmq_fx")
    logger.setLevel(logging.INFO)
    logger.addHandler(noted)
    began = time.perf_counter()
    if way in ("artefact", "fresh"):
        program = tfmq_fx.quantize(model, None, batches, timesteps=schedule.timesteps, progress=False)
    else:
        given = batches[:: max(1, rows // CHECKED)][:CHECKED] if way == "checked" else None
        program = tfmq_fx.requantize(artefact, model, given)
    logger.info("end")
    stages = noted.stages()
    own = sum(stage["cpu_seconds"] for stage in stages.values())
    row: dict[str, Any] = {
        "name": name,
        "way": way,
        "rows": rows,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - began,
        "processor_of_others_seconds": processor_seconds() - others - own,
        "stages": stages,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    with torch.no_grad():
        row["relative_error"] = relative_error(program.graph_module(**test), original)
    if program.requantization is not None:
        row["widened"] = len(program.requantization.widened)
        row["kept"] = program.requantization.kept
    if way == "artefact":
        tfmq_fx.save(program, artefact)
    return row


def in_own_processes(name: str, rows: int) -> list[dict[str, Any]]:
    """Measure one UNet in every way, each in a new process, so that it has its own peak of memory."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            file = Path(folder) / f"{way}.json"
            command = [
                sys.executable,
                __file__,
                "--unets",
                name,
                "--rows",
                str(rows),
                "--here",
                str(file),
                "--way",
                way,
            ]
            subprocess.run(command, check=True)
            found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """A row for each UNet and way."""
    lines = ["| UNet | way | seconds | peak | relative error | widened |", "|---|---|---|---|---|---|"]
    for row in rows:
        widened = f"{row['widened']} of {row['kept']}" if "widened" in row else ""
        size, peak = f"{row['parameters'] / 1e6:.1f} M", f"{row['peak_bytes'] / 2**30:.1f} GiB"
        lines.append(
            f"| {row['name']}, {size} | {row['way']} | {row['seconds']:.1f} | {peak} | {row['relative_error']:.4f} | "
            f"{widened} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write after every UNet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unets", nargs="+", choices=list(UNETS), default=list(UNETS))
    parser.add_argument("--rows", type=int, default=8, help="calibration rows")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--here", type=Path, help="measure the one UNet in this process and write it there")
    parser.add_argument("--way", choices=WAYS, default=WAYS[0], help="with --here")
    options = parser.parse_args()
    if options.here:
        row = measure(options.unets[0], options.way, options.rows, options.here.parent / "artefact")
        options.here.write_text(json.dumps(row), encoding="utf-8")
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    if options.json.is_file():
        for row in json.loads(options.json.read_text(encoding="utf-8"))["rows"]:
            rows.setdefault(row["name"], []).append(row)
    cores = sorted(os.sched_getaffinity(0))
    for name in [] if options.report else options.unets:
        rows[name] = in_own_processes(name, options.rows)
        content = {
            **machine(cores, torch.get_num_threads()),
            "rows": [row for unet in UNETS for row in rows.get(unet, [])],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(markdown([row for unet in UNETS for row in rows.get(unet, [])]))


if __name__ == "__main__":
    main()
