"""What quantizing to W8A8 with FSC costs by the size of the UNet: seconds and peak memory of each stage.

    python benchmarks/scale.py                     # bundled (2.7 M parameters), cifar (35.7 M), sd15 (860 M)
    python benchmarks/scale.py --unets sd15 --rows 4
    python benchmarks/scale.py --report

Up to the quantized program, so without compiling. Every UNet in a process of its own. Calibration inputs are given;
``calibrate`` runs ``--rows`` of them one by one, so its time is that of as many float forwards with observers. What a
stage leaves behind is dropped before the next one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from coverage_row import close, draw_zeros, relative_error, stage
from timing.machine import machine
from timing.process import BENCHMARKS
from timing.unets import UNETS

import tfmq_fx

RESULTS = BENCHMARKS / "results" / "scale.json"
STAGES = ("capture", "find_temporal_block", "prepare", "calibrate", "convert")


def measure(name: str, rows: int) -> dict[str, Any]:
    """The stages of one UNet, and the relative error of what comes out.

    Args:
        name: Of the UNet.
        rows: Calibration batches of one row.
    """
    unet, schedule = UNETS[name], UNETS[name].schedule()
    row: dict[str, Any] = {"name": name, "rows": rows}
    with stage(row, "build"):
        model = unet.build()
        draw_zeros(model)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    spread = torch.linspace(0, len(schedule.timesteps) - 1, rows + 1).long()
    batches = [{**unet.normal(1, 100 + at), "timestep": schedule.timesteps[spread[at], None]} for at in range(rows + 1)]
    test = batches.pop(rows // 2)
    with torch.no_grad():
        original = model(**test).sample
    with stage(row, "capture"):
        captured = tfmq_fx.capture(model, example_kwargs=test, dynamic_batch=False)
    del model
    with stage(row, "find_temporal_block"):
        block = tfmq_fx.find_temporal_block(captured)
    row["temporal_layers"] = len(block.linears)
    with stage(row, "prepare"):
        config = tfmq_fx.QuantizationConfig(weight_bits=8)
        prepared = tfmq_fx.prepare(captured, config, timesteps=schedule.timesteps)
        del captured, block
        gc.collect()
    with stage(row, "calibrate"):
        tfmq_fx.calibrate(prepared, batches, progress=False)
    with stage(row, "convert"):
        program = tfmq_fx.convert(prepared)
    del prepared
    close(row)
    with torch.no_grad():
        row["relative_error"] = relative_error(program.graph_module(**test), original)
    return row


def in_own_process(name: str, rows: int) -> dict[str, Any]:
    """Measure one UNet in a new process, so that it has its own peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--unets", name, "--rows", str(rows), "--here", str(file)]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def slope(rows: list[Mapping[str, Any]], name: str) -> float:
    """Seconds of a stage for each 100 M parameters: the least-squares line through the UNets."""
    sizes = [row["parameters"] / 1e8 for row in rows]
    seconds = [row["stages"][name]["seconds"] for row in rows]
    middle, mean = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
    squares = sum((size - middle) ** 2 for size in sizes)
    return sum((s - middle) * (t - mean) for s, t in zip(sizes, seconds, strict=True)) / squares


def markdown(result: Mapping[str, Any]) -> str:
    """A column a UNet, a row a stage: seconds, and the peak of memory up to its end."""
    rows = result["rows"]
    names = " | ".join(f"{row['name']}, {row['parameters'] / 1e6:.1f} M" for row in rows)
    lines = [f"| stage | {names} | s per 100 M parameters |", "|---|" + "---|" * (len(rows) + 1)]
    for name in STAGES:
        cells = [f"{s['seconds']:.1f} s, {s['peak_bytes'] / 2**30:.1f} GiB" for s in (r["stages"][name] for r in rows)]
        growth = f"{slope(rows, name):.1f}" if len(rows) > 1 else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {growth} |")
    sums = [sum(row["stages"][name]["seconds"] for name in STAGES) for row in rows]
    cells = [f"{s:.1f} s, {row['peak_bytes'] / 2**30:.1f} GiB" for s, row in zip(sums, rows, strict=True)]
    growth = f"{sum(slope(rows, name) for name in STAGES):.1f}" if len(rows) > 1 else ""
    lines.append(f"| together | {' | '.join(cells)} | {growth} |")
    errors = " | ".join(f"{row['relative_error']:.4f}" for row in rows)
    return "\n".join([*lines, f"| relative error | {errors} | |"])


def main() -> None:
    """Measure, write after every UNet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unets", nargs="+", choices=list(UNETS), default=list(UNETS))
    parser.add_argument("--rows", type=int, default=8, help="calibration rows")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--here", type=Path, help="measure the one UNet in this process and write it there")
    options = parser.parse_args()
    if options.here:
        options.here.write_text(json.dumps(measure(options.unets[0], options.rows)), encoding="utf-8")
        return
    rows = {}
    if options.json.is_file():
        rows = {row["name"]: row for row in json.loads(options.json.read_text(encoding="utf-8"))["rows"]}
    cores = sorted(os.sched_getaffinity(0))
    for name in [] if options.report else options.unets:
        rows[name] = in_own_process(name, options.rows)
        about = machine(cores, torch.get_num_threads())
        content = {**about, "rows": [rows[unet] for unet in UNETS if unet in rows]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(markdown({"rows": [rows[unet] for unet in UNETS if unet in rows]}))


if __name__ == "__main__":
    main()
