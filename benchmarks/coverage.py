"""Which architectures are quantized and lowered, and how far: one row each, random weights, narrow widths.

    python benchmarks/coverage.py                      # every row, in processes of their own
    python benchmarks/coverage.py --rows "SD 1" DiT    # some of them
    python benchmarks/coverage.py --backend reference  # without compiling

A row that is refused says why in one sentence; a row that fails in another way is a bug. ``azula`` and ``monai`` are
not needed for the others: ``pip install --no-deps azula einops monai``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, Example
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

import tfmq_fx
from tfmq_fx.errors import TfmqError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"


def batches(example: Example, count: int = 8) -> list[dict[str, Any]]:
    """Calibration batches along the schedule: other noise, other timesteps, the same conditions."""
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(100 + index)

        def drawn(leaf: Any, generator: torch.Generator = generator) -> Any:
            noisy = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 2
            return torch.randn(leaf.shape, generator=generator) if noisy else leaf

        inputs = pytree.tree_map(drawn, dict(example.inputs))
        if example.timestep in inputs:
            picked = torch.randint(len(example.timesteps), (2,), generator=generator)
            inputs[example.timestep] = example.timesteps[picked].to(example.inputs[example.timestep].dtype)
        made.append(inputs)
    return made


def first_tensor(outputs: Any) -> Tensor:
    """The first tensor of a model's result."""
    return next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def relative_error(ours: Any, theirs: Tensor) -> float:
    """Root of the squared error over that of the original."""
    a, b = first_tensor(ours).detach().double(), theirs.double()
    return float((a - b).norm() / b.norm())


def find(captured: Any, example: Example) -> dict[str, Any]:
    """What the analysis sees: the block by the timestep alone, and with class labels beside it."""
    block = tfmq_fx.find_temporal_block(captured, example.timestep)
    classes = tuple(name for name in ("class_labels", "y") if name in example.inputs)
    whole = tfmq_fx.find_temporal_block(captured, example.timestep, finite=classes) if classes else block
    return {
        "h": len(block.time_embedding),
        "g": len(block.embedding_layers),
        "frontier": len(block.features),
        "reason": block.reason,
        "g_with_classes": len(whole.embedding_layers) if classes else None,
    }


def quantized(captured: Any, example: Example, weight_bits: int, temporal: str) -> Any:
    """Prepare, calibrate, convert."""
    config = tfmq_fx.QuantizationConfig(weight_bits=weight_bits, temporal=temporal)
    prepared = tfmq_fx.prepare(captured, config, timesteps=example.timesteps, timestep=example.timestep)
    tfmq_fx.calibrate(prepared, batches(example), progress=False)
    return tfmq_fx.convert(prepared)


def measure(name: str, backend: str) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"name": name, "backend": backend}
    began = time.perf_counter()
    try:
        example = ARCHITECTURES[name]()
    except ModuleNotFoundError as error:
        return {**row, "refused": f"not installed here: {error.name}"}
    row["parameters"] = sum(parameter.numel() for parameter in example.model.parameters())
    with torch.no_grad():
        original = first_tensor(example.model(**example.inputs))
    try:
        captured = tfmq_fx.capture(example.model, example_kwargs=example.inputs, dynamic_batch=example.dynamic_batch)
        row["captured"] = captured.meta["tfmq_fx.interface"]["route"]
        row["block"] = find(captured, example)
        # What the refusal of a model without a temporal block tells the user to do.
        temporal = "float" if row["block"]["reason"] else "fsc"
        for bits in (4, 8):
            program = quantized(captured, example, bits, temporal)
            row[f"W{bits}A8"] = relative_error(program.graph_module(**example.inputs), original)
        denoiser = tfmq_fx.lower(program, backend)
        row["lowered"] = relative_error(denoiser(**example.inputs), original)
        report = denoiser.report
        row.update(
            eligible=report.eligible,
            integer=report.integer_kernels,
            temporal_layers=report.temporal_layers,
            table_rows=report.table_rows,
            float_because=dict(Counter(entry.reason for entry in report.entries if entry.reason)),
        )
    except TfmqError as error:
        row["refused"] = str(error)
    row["seconds"] = time.perf_counter() - began
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def in_own_process(name: str, backend: str) -> dict[str, Any]:
    """Measure a row in a new process, so that it has its own peak of memory and its own failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--rows", name, "--backend", backend, "--here", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if file.is_file():
            result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return result
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"name": name, "backend": backend, "failed": last}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    block = row.get("block")
    found = ""
    if block:
        found = f"h {block['h']}, g {block['g']}, frontier {block['frontier']}"
        if block["reason"]:
            found = f"none: {block['reason']}"
        if block["g_with_classes"] is not None:
            found += f" (with classes g {block['g_with_classes']})"

    def percent(key: str) -> str:
        return f"{row[key]:.1%}" if key in row else ""

    kernels = f"{row['integer']} of {row['eligible']}" if "integer" in row else ""
    outcome = row.get("refused") or row.get("failed", "")
    size = f"{row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.1f} GB" if "seconds" in row else ""
    return [row["name"], row.get("captured", ""), found, kernels, percent("W8A8"), percent("W4A8"), size, outcome]


TITLES = (
    "architecture",
    "captured",
    "temporal block",
    "integer kernels",
    "error W8A8",
    "error W4A8",
    "cost",
    "refused",
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--backend", choices=["inductor", "reference"], default="inductor")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--here", type=Path, help="measure the one row in this process and write it there")
    options = parser.parse_args()
    if options.here:
        options.here.write_text(json.dumps(measure(options.rows[0], options.backend)), encoding="utf-8")
        return
    rows = [in_own_process(name, options.backend) for name in track(options.rows, "architectures")]
    table = Table(*TITLES)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=220).print(table)
    print(f"| {' | '.join(TITLES)} |\n{'|---' * len(TITLES)}|")
    print("\n".join(f"| {' | '.join(cells(row))} |" for row in rows))
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
