"""Pipelines of diffusers x what users do with them: quantize, sample, save, load, compile, on tiny models.

    python benchmarks/pipeline_matrix.py run                     # the rows that are not recorded yet
    python benchmarks/pipeline_matrix.py run --compile           # and the last column, which takes most of the time
    python benchmarks/pipeline_matrix.py run --rows Flux "Wan"   # these, again
    python benchmarks/pipeline_matrix.py report

A cell is right when its result is near the float pipeline's (the figure is the mean difference, in standard deviations
of the float result; where one is too far off, the program in 32 bits says whether rounding is to blame), or what loads
is equal to what was saved; or it holds the one sentence that refuses. "not in float": diffusers cannot do it with the
float pipeline either. Each row runs in a process of its own, and what was saved is loaded in another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pipelines import ROWS
from pipelines.row import Row
from torch import Tensor

import tfmq_fx

RESULTS = Path(__file__).resolve().parent / "results" / "pipeline_matrix.json"
CELLS = ("quantize", "sample", "batch of 3", "other scheduler", "other steps", "unrounded", "save", "load", "compiled")
SAVED = ("save", "load")
#: Of the float result's standard deviation.
NEAR = 0.1
#: The same in 32 bits: sums in another order.
EQUAL = 1e-3
MOST_SECONDS = 1200
Cell = dict[str, Any]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Mean absolute difference in standard deviations of what was wanted."""
    if found.shape != wanted.shape:
        msg = f"the result has the shape {tuple(found.shape)}, the float pipeline's {tuple(wanted.shape)}"
        raise ValueError(msg)
    return float((found - wanted).abs().mean() / wanted.std())


def filled(cell: Callable[[], Cell]) -> Cell:
    """The cell, or the sentence that refuses it, or the fault."""
    try:
        return cell()
    except tfmq_fx.TfmqError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"[:400]}


def compared(found: Tensor, wanted: Tensor) -> Cell:
    """A figure, and whether it is near enough."""
    off = distance(found, wanted)
    return {"difference": round(off, 4), "right": off < NEAR}


@contextlib.contextmanager
def scheduled(pipeline: Any, scheduler: Any) -> Iterator[Any]:
    """The pipeline with another scheduler."""
    before, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        yield pipeline
    finally:
        pipeline.scheduler = before


def measure(row: Row, *, compiles: bool) -> dict[str, Cell]:
    """The cells of a row; the last one where it ``compiles``."""
    quantized, plain = row.pipeline(), row.pipeline()
    cells: dict[str, Cell] = {}

    def quantize() -> Cell:
        began = time.perf_counter()
        tfmq_fx.quantize_pipeline(
            quantized, steps=row.steps, lower="reference", progress=False, **row.arguments, **row.options
        )
        return {"right": True, "seconds": round(time.perf_counter() - began, 1)}

    cells["quantize"] = filled(quantize)
    if not cells["quantize"].get("right"):
        return cells
    cells["sample"] = filled(lambda: compared(row.sample(quantized), row.sample(plain)))
    cells["batch of 3"] = filled(lambda: compared(row.sample(quantized, **row.batch), row.sample(plain, **row.batch)))
    other = row.other_scheduler
    if other is not None:

        def rescheduled() -> Cell:
            with scheduled(quantized, other(quantized)), scheduled(plain, other(plain)):
                return compared(row.sample(quantized), row.sample(plain))

        cells["other scheduler"] = filled(rescheduled)
    more = {"num_inference_steps": row.other_steps}
    cells["other steps"] = filled(lambda: compared(row.sample(quantized, **more), row.sample(plain, **more)))
    if not all(cell.get("right", True) for cell in cells.values()):
        cells["unrounded"] = filled(lambda: unrounded(row))
    with tempfile.TemporaryDirectory() as folder:
        cells["save"] = filled(lambda: saved(row, quantized, Path(folder)))
        if cells["save"].get("right"):
            cells["load"] = filled(lambda: loaded_elsewhere(row, Path(folder)))
            if not cells["load"].get("right") and (reason := float_round_trip(row, Path(folder))):
                cells["load"] = {"upstream": reason}
    if compiles:
        cells["compiled"] = filled(lambda: compiled(row, quantized))
    return cells


def unrounded(row: Row) -> Cell:
    """Where W8A8 is off on a model that was never trained: the same program in 32 bits."""
    given = row.options.get("config") or tfmq_fx.QuantizationConfig()
    config = dataclasses.replace(given, weight_bits=32, activation_bits=32)
    pipeline, plain = row.pipeline(), row.pipeline()
    options = {**row.options, "config": config}
    tfmq_fx.quantize_pipeline(pipeline, steps=row.steps, lower="reference", progress=False, **row.arguments, **options)
    more = {"num_inference_steps": row.other_steps}
    off = max(distance(row.sample(pipeline, **given), row.sample(plain, **given)) for given in ({}, row.batch, more))
    return {"difference": off, "right": off < EQUAL}


def saved(row: Row, pipeline: Any, folder: Path) -> Cell:
    """Write the pipeline, and what it samples beside it."""
    pipeline.save_pretrained(folder / "pipeline")
    torch.save(row.sample(pipeline), folder / "wanted.pt")
    return {"right": True}


def loaded_elsewhere(row: Row, folder: Path) -> Cell:
    """Load it in a new process."""
    command = [sys.executable, __file__, "load", "--rows", row.name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    return last_line(done)


def float_round_trip(row: Row, folder: Path) -> str:
    """Why diffusers cannot save, load and run the float pipeline either; empty where it can."""
    pipeline = row.pipeline()
    try:
        pipeline.save_pretrained(folder / "float")
        loaded = type(pipeline).from_pretrained(folder / "float", **row.absent(pipeline), **row.loading)
        off = float((row.sample(loaded) - row.sample(pipeline)).abs().max())
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "" if off == 0.0 else f"the float pipeline's own result is off by up to {off:.1e} when it was loaded"


def load(row: Row, folder: Path) -> Cell:
    """What the new process does."""
    from diffusers import PipelineQuantizationConfig

    from tfmq_fx.diffusers import TFMQConfig

    plain = row.pipeline()
    parts = [name for name, _ in quantized_parts(folder / "pipeline")]
    mapping = PipelineQuantizationConfig(quant_mapping={name: TFMQConfig("reference") for name in parts})
    pipeline = type(plain).from_pretrained(
        folder / "pipeline", quantization_config=mapping, **row.absent(plain), **row.loading
    )
    pipeline.set_progress_bar_config(disable=True)
    difference = float((row.sample(pipeline) - torch.load(folder / "wanted.pt", weights_only=True)).abs().max())
    return {"difference": difference, "right": difference == 0.0}


def quantized_parts(folder: Path) -> Iterator[tuple[str, Path]]:
    """The folders of a saved pipeline that hold artefacts."""
    for manifest in sorted(folder.glob("*/manifest.json")):
        yield manifest.parent.name, manifest.parent


def compiled(row: Row, pipeline: Any) -> Cell:
    """On the default backend, against the reference backend."""
    from tfmq_fx.diffusers import to_diffusers

    wanted, reports = row.sample(pipeline), []
    for name, module in list(pipeline.components.items()):
        if hasattr(module, "served"):
            denoiser = tfmq_fx.lower(module.served.program)
            reports.append(denoiser.report)
            setattr(pipeline, name, to_diffusers(module.served.program, denoiser))
    cell = compared(row.sample(pipeline), wanted)
    return {**cell, "integer": sum(r.integer_kernels for r in reports), "eligible": sum(r.eligible for r in reports)}


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    """What a process printed as JSON at the end."""
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError):
        return {"fault": f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"}


def run(names: list[str] | None, *, compiles: bool) -> None:
    """Each missing row, or those that are named, in its own process."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for row in ROWS:
        done = row.name in kept and (not compiles or "compiled" in kept[row.name])
        if done if names is None else row.name not in names:
            continue
        command = [sys.executable, __file__, "row", "--rows", row.name, *(["--compile"] if compiles else [])]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
            cells = last_line(ended)
            cells = {"quantize": cells} if "fault" in cells else cells
        except subprocess.TimeoutExpired:
            cells = {"quantize": {"fault": f"it took longer than {MOST_SECONDS} s"}}
        kept[row.name] = cells
        RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{row.name}: {', '.join(f'{name} {mark(cell)}' for name, cell in cells.items())}", flush=True)


def mark(cell: Cell | None) -> str:
    """A cell of the table."""
    if cell is None:
        return "–"
    if "upstream" in cell:
        return "not in float"
    if "refused" in cell or "fault" in cell:
        return "sentence" if "refused" in cell else "fault"
    figure = f"{cell['difference']:.3f}" if "difference" in cell else ""
    return (f"yes {figure}" if cell["right"] else f"off {figure}").strip()


def report() -> None:
    """Print the table, the sentences and the counts."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    print("| pipeline | " + " | ".join(CELLS) + " |\n|" + "---|" * (len(CELLS) + 1))
    for name, cells in kept.items():
        print(f"| {name} | " + " | ".join(mark(cells.get(cell)) for cell in CELLS) + " |")
    print()
    for name, cells in kept.items():
        for title, cell in cells.items():
            if said := cell.get("refused") or cell.get("fault") or cell.get("upstream"):
                print(f"- {name}, {title}: {said}")
    print(f"\n{len(kept)} rows")
    for near, what in (
        (True, "near the float pipeline"),
        (False, "or off by rounding alone, untrained as these models are"),
    ):
        usual = [all(fine(cells, cell, near=near) for cell in CELLS[:2] + SAVED) for cells in kept.values()]
        whole = [all(fine(cells, cell, near=near) for cell in cells) for cells in kept.values()]
        print(f"- {what}: {sum(usual)} quantize, sample, save and load; in {sum(whole)} every cell is right")


def fine(cells: dict[str, Cell], name: str, *, near: bool) -> bool:
    """Whether a cell is right, or there is nothing to compare it with; not ``near`` admits what rounding explains."""
    cell = cells.get(name, {})
    rounded = not near and cells.get("unrounded", {}).get("right", False) and "difference" in cell
    return bool(cell.get("right") or "upstream" in cell or rounded)


def main() -> None:
    """Run, report, or be one of the processes of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report", "row", "load"))
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.command in ("run", "report"):
        run(options.rows, compiles=options.compile) if options.command == "run" else report()
        return
    warnings.simplefilter("ignore")
    (row,) = (row for row in ROWS if row.name == options.rows[0])
    if options.command == "row":
        print(json.dumps(measure(row, compiles=options.compile)))
    else:
        print(json.dumps(filled(lambda: load(row, options.folder))))


if __name__ == "__main__":
    main()
