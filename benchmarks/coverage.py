"""Which architectures are quantized and lowered, and how far: one row each, random weights, narrow widths.

    python benchmarks/coverage.py                      # every row that is not recorded, in processes of their own
    python benchmarks/coverage.py --rows "SD 1" DiT    # some of them
    python benchmarks/coverage.py --again              # recorded ones too
    python benchmarks/coverage.py --backend reference --json other.json      # without compiling
    python benchmarks/coverage.py --rows "SD 1.5, true size"                 # 860 M parameters, 8 GiB; only when asked
    python benchmarks/coverage.py --report             # the table of what is recorded

A row that is refused says why in one sentence; a row that fails in another way is a bug. ``azula`` and ``monai`` are
not needed for the others: ``pip install --no-deps azula einops monai``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, TRUE_SIZE
from coverage_report import markdown
from coverage_row import measure, measure_true_size
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
NAMES = [*ARCHITECTURES, *TRUE_SIZE]


def in_own_process(name: str, backend: str) -> dict[str, Any]:
    """Measure a row in a new process, so that it has its own peak of memory and its own failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--rows", name, "--backend", backend, "--here", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if file.is_file():
            result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return result
    last = (done.stderr.strip().splitlines() or [""])[-1]
    why = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}: {last}"
    return {"name": name, "backend": backend, "failed": why}


def recorded(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of a results file by name."""
    if not file.is_file():
        return {}
    return {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


def write(file: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows in the order of the architectures, with the machine that they were measured on."""
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rows": [rows[name] for name in NAMES if name in rows],
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing, write after every row, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=list(ARCHITECTURES))
    parser.add_argument("--backend", choices=["inductor", "reference"], default="inductor")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure recorded rows too")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--here", type=Path, help="measure the one row in this process and write it there")
    options = parser.parse_args()
    if options.here:
        name = options.rows[0]
        row = measure_true_size(name) if name in TRUE_SIZE else measure(name, options.backend)
        options.here.write_text(json.dumps(row), encoding="utf-8")
        return
    rows = recorded(options.json)
    missing = [name for name in options.rows if options.again or name not in rows or "failed" in rows[name]]
    for name in track([] if options.report else missing, "architectures"):
        rows[name] = in_own_process(name, options.backend)
        write(options.json, rows)
    print(markdown([rows[name] for name in NAMES if name in rows]))
    if any("failed" in row for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
