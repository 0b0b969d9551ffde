"""How fast each engine runs a UNet, from interleaved runs: one process an engine, A B C A B C ..., checked outputs.

    make bench-peers                                                # the others, in environments of their own
    python benchmarks/latency.py                                    # every cell that is not recorded
    python benchmarks/latency.py --unets cifar --batches 1 4 --engines "compile fp32" "ours W8A8 inductor" --again
    python benchmarks/latency.py --unets sd15 --batches 1 --rounds 3 --engines "compile fp32" "ours W8A8 inductor"
    python benchmarks/latency.py --list                             # the engines
    python benchmarks/latency.py --report                           # the tables of what is recorded

A cell is a UNet and a batch. All engines of a cell are loaded, each in a process pinned to the same cores; then they
have turns of a few calls, one engine at a time, while the others sleep. A time is the median over the rounds; a ratio
is the median of the rounds' own ratios, with its quartiles. Every engine's output is compared with eager float32 on
the same inputs first, and an engine that is wrong gets no time. All int8 engines calibrate on the same inputs.
What engines prepare is kept in ``runs/latency``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency_engines import ENGINES
from timing.machine import machine
from timing.process import BENCHMARKS, WorkerProcess, interpreter
from timing.rounds import Turn, ratios, run_rounds, spread
from timing.tables import markdown

RESULTS = BENCHMARKS / "results" / "latency.json"
ROOFLINE = BENCHMARKS / "results" / "roofline.json"
RUNS = BENCHMARKS.parent / "runs" / "latency"
UNETS = ("bundled", "cifar", "sd15")
EAGER, REFERENCE = "eager fp32", "compile fp32"


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root of the squared error over that of the original; infinite where ours is not finite or has another shape."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def share_files(unet: str, folder: Path, batches: list[int], engines: list[str]) -> None:
    """Write what the engines share, and the float model for those of them that have no torch."""
    command = [sys.executable, "-m", "timing.run_folder", unet, str(folder), *map(str, batches)]
    subprocess.run(command, check=True, cwd=BENCHMARKS)
    exporter = interpreter("export")
    others = sorted({ENGINES[name].environment for name in engines} - {"project"})
    if others and exporter.exists():
        script = BENCHMARKS / "latency_engines" / "export_files.py"
        subprocess.run([exporter, script, folder, *others], check=True)


class Cell:
    """A UNet and a batch, measured with some engines.

    Args:
        unet: Name of the UNet.
        batch: Batch size.
        options: Of the command line.
    """

    def __init__(self, unet: str, batch: int, options: argparse.Namespace) -> None:
        self.folder, self.batch, self.options = RUNS / unet, batch, options
        self.cores = sorted(os.sched_getaffinity(0))[: options.threads]
        self.rows: dict[str, dict[str, Any]] = {}

    def start(self, name: str) -> WorkerProcess:
        """A new process for an engine."""
        return WorkerProcess(
            name, self.folder, self.cores, self.options.threads, self.folder / "inductor" / self.key(name)
        )

    def key(self, name: str) -> str:
        """What an engine compiles, and records of it, is kept under: once for all batches where they share the code."""
        short = name.replace(" ", "-").replace(",", "")
        return short if ENGINES[name].dynamic else f"{short}-b{self.batch}"

    def prepare(self, name: str) -> dict[str, Any]:
        """Let an engine write its files, once; what that took is kept beside them."""
        engine = ENGINES[name]
        if not interpreter(engine.environment).exists():
            return {"refused": f"the environment {engine.environment!r} is missing: run `make bench-peers`"}
        file = self.folder / f"prepared-{engine.prepared}.json"
        if not file.is_file():
            worker = self.start(name)
            answer = worker.ask("prepare")
            worker.stop()
            if "refused" in answer:
                return answer
            file.write_text(json.dumps(answer), encoding="utf-8")
        prepared: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return prepared

    def load(self, name: str, output: Path) -> WorkerProcess | None:
        """Prepare and load one engine; None, with the reason in its row, where that fails.

        The first start compiles, and is recorded as such; later ones find what Inductor keeps on disk.
        """
        row = self.rows.setdefault(name, {"arithmetic": ENGINES[name].arithmetic})
        prepared = self.prepare(name)
        if "refused" in prepared:
            row["refused"] = prepared["refused"]
            return None
        file = self.folder / f"starts-{self.key(name)}.json"
        starts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        worker = self.start(name)
        answer = worker.ask("load", batch=self.batch, output=str(output))
        answer["start_seconds"] = time.perf_counter() - worker.started
        if "refused" in answer:
            row["refused"] = answer["refused"]
            worker.stop()
            return None
        starts["later" if "first" in starts else "first"] = answer
        file.write_text(json.dumps(starts), encoding="utf-8")
        row.update(
            prepare_seconds=prepared["seconds"],
            prepare_peak_bytes=prepared["peak_bytes"],
            starts=starts,
            file_bytes=answer["file_bytes"],
        )
        return worker

    def measure(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Load, check and time the engines; rows by engine."""
        with tempfile.TemporaryDirectory() as scratch:
            workers = self.loaded(names, Path(scratch))
            print(f"{self.folder.name}, batch {self.batch}: timing {len(workers)} engines", file=sys.stderr, flush=True)
            try:
                self.time_steps(workers)
                if self.options.sampling:
                    self.time_sampling(workers, Path(scratch))
            finally:
                for worker in workers:
                    worker.stop()
        return {name: row for name, row in self.rows.items() if name in names}

    def loaded(self, names: list[str], scratch: Path) -> list[WorkerProcess]:
        """The engines that load and are right, eager float32 among them only when it is asked for.

        All of them prepare before one is loaded: quantizing takes more memory than running.
        """
        for name in names:
            print(f"{self.folder.name}, batch {self.batch}: preparing {name}", file=sys.stderr, flush=True)
            self.prepare(name)
        workers = []
        expected = None
        for name in dict.fromkeys([EAGER, *names]):
            output = scratch / f"{len(self.rows)}.npy"
            print(f"{self.folder.name}, batch {self.batch}: loading {name}", file=sys.stderr, flush=True)
            worker = self.load(name, output)
            if worker is None:
                continue
            result = np.load(output)
            expected = result if name == EAGER else expected
            error = relative_error(result, expected) if expected is not None else float("inf")
            self.rows[name]["relative_error"] = error
            limit = ENGINES[name].wrong
            if error > limit:
                self.rows[name]["refused"] = f"wrong: relative error {error:.2g} to eager float32, over {limit}"
            if error > limit or name not in names:
                worker.stop()
                continue
            workers.append(worker)
        return workers

    def time_steps(self, workers: list[WorkerProcess]) -> None:
        """Single steps: a first round to warm up, then the rounds that count."""
        request = {"what": "time", "calls": self.options.calls}
        run_rounds(workers, self.options.warmup, request, len(self.cores))
        turns = run_rounds(workers, self.options.rounds, request, len(self.cores))
        for name, own in turns.items():
            self.rows[name].update(
                seconds=spread([turn.median for turn in own]),
                others=max(turn.others for turn in own),
                peak_bytes=max(turn.peak_bytes for turn in own),
                turns=[list(turn.seconds) for turn in own],
            )
            self.compare(name, turns, "times_faster")

    def time_sampling(self, workers: list[WorkerProcess], scratch: Path) -> None:
        """Whole sampling runs, compared with those of the first engine."""
        requests = {worker.name: scratch / f"sampled-{at}.npy" for at, worker in enumerate(workers)}
        for worker in workers:
            worker.ask("sample", output=str(requests[worker.name]))
        turns = run_rounds(
            workers, self.options.sampling, {"what": "sample", "output": str(scratch / "s.npy")}, len(self.cores)
        )
        first = np.load(requests[workers[0].name])
        for name, own in turns.items():
            self.rows[name]["sampling_seconds"] = spread([turn.median for turn in own])
            self.rows[name]["sampling_error"] = relative_error(np.load(requests[name]), first)
            self.compare(name, turns, "sampling_times_faster")

    def compare(self, name: str, turns: dict[str, list[Turn]], key: str) -> None:
        """How many times faster than every other engine, round by round."""
        self.rows[name][key] = {other: ratios(theirs, turns[name]) for other, theirs in turns.items() if other != name}


def recorded(file: Path) -> dict[str, Any]:
    """The cells of a results file by ``unet/batch``."""
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content["cells"]


def main() -> None:
    """Measure what is missing, write after every cell, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unets", nargs="+", choices=UNETS, default=["bundled", "cifar"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--calls", type=int, default=4, help="calls of a turn, whose median counts")
    parser.add_argument("--sampling", type=int, default=0, help="rounds of whole sampling runs; 0 leaves them out")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the cells are recorded")
    parser.add_argument("--again", action="store_true", help="measure recorded cells too")
    parser.add_argument("--list", action="store_true", help="name the engines")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ENGINES))
        return
    cells = recorded(options.json)
    wanted = [] if options.report else [(unet, batch) for unet in options.unets for batch in options.batches]
    for unet, batch in wanted:
        key = f"{unet}/{batch}"
        if key in cells and not options.again:
            continue
        lost = set(cells.get(key, {"engines": ()})["engines"]) - set(options.engines)
        if lost:
            parser.error(f"this would drop {len(lost)} engines of the recorded cell {key}; give another file by --json")
        share_files(unet, RUNS / unet, options.batches, options.engines)
        cell = Cell(unet, batch, options)
        rows = cell.measure(options.engines)
        cells[key] = {**machine(cell.cores, options.threads), "unet": unet, "batch": batch, "engines": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")
    roofline = json.loads(ROOFLINE.read_text(encoding="utf-8")) if ROOFLINE.is_file() else {}
    print(markdown(cells, REFERENCE, roofline))


if __name__ == "__main__":
    main()
