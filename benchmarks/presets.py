"""Every preset on the bundled model, at W8A8 and W4A8, in one table, best first.

    python benchmarks/presets.py                        # what is not measured yet, then the table and its JSON
    python benchmarks/presets.py --presets ptq4dm ptqd  # these only
    python benchmarks/presets.py --report               # the table of what is measured, and
                                                        # benchmarks/results/presets.json

One process a cell; everything is kept in ``runs/presets``, so a run that was cut off goes on where it stopped. A
program is made once for all presets that ask for the same one, and read from ``runs/quality/bundled`` where
``benchmarks/quality.py`` made it. Blocks are trained as there: 900 iterations at 4 bits, 300 at 8, batches of 8,
bfloat16 at 4 bits; the temporal block 4,000; activation steps as long as the preset says in proportion.

The measures hold samples against the float model's from the same noise: DDIM in 50 steps, once deterministic (eta 0)
and once stochastic (eta 1, which is DDPM's noise), where both get the same stream of noise. A preset that comes with a
wrapped scheduler is sampled with it, and without it for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from quality_cells import ROOT, kept, write_json
from quality_cells import WORK as QUALITY_WORK
from quality_features import compare_features, mismatch_entry
from quality_methods import BITS, ITERATIONS
from quality_models import BUNDLED, MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

import tfmq_fx
from tfmq_fx import QuantizationConfig, QuantizedProgram
from tfmq_fx.cli.example_inputs import unconditional_inputs
from tfmq_fx.config.presets import PRESETS, Preset, find_preset
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.data.prediction import predicted
from tfmq_fx.diagnostics import (
    Trajectory,
    find_mismatch,
    graph_denoiser,
    temporal_features,
    trajectory_deviation,
    with_temporal_features,
)
from tfmq_fx.diagnostics.comparison import ddim_scheduler, path_bytes
from tfmq_fx.schedulers import (
    PTQDScheduler,
    QuantizedSampleScheduler,
    collect_noise_statistics,
    collect_sample_ranges,
)

WORK = ROOT / "runs" / "presets"
QUALITY = QUALITY_WORK / BUNDLED
STEPS = MODELS[BUNDLED].steps
RESULT = ROOT / "benchmarks" / "results" / "presets.json"
ETAS = (0.0, 1.0)

Denoiser = Callable[[Tensor, Tensor], Any]


def cell_file(preset: str, bits: str, seed: int) -> Path:
    """Where a cell's measures are kept."""
    return WORK / "cells" / f"{bits}-{preset}-s{seed}.json"


def configuration(preset: str, bits: str, seed: int) -> QuantizationConfig:
    """The preset at these bits, trained as long as the quality benchmark trains."""
    weight_bits, activation_bits = BITS[bits]
    config = QuantizationConfig.preset(preset, weight_bits=weight_bits, activation_bits=activation_bits)
    if config.resolved_reconstruction is None:
        return config
    reconstruction = dataclasses.replace(
        config.resolved_reconstruction,
        iterations=ITERATIONS[weight_bits],
        temporal_iterations=4000,
        batch_size=8,
        precision="bfloat16" if weight_bits == 4 else "float32",
        seed=seed,
    )
    return dataclasses.replace(config, reconstruction=reconstruction)


def calibration(model: Any, ddim: Any, sampler: str, seed: int) -> list[dict[str, Any]]:
    """Calibration batches; the uniform ones are those of the quality benchmark."""
    file = (
        QUALITY / "calibration" / f"s{seed}.pt"
        if sampler == "uniform"
        else WORK / "calibration" / f"{sampler}-s{seed}.pt"
    )
    batches: list[dict[str, Any]] = kept(
        file,
        lambda: tfmq_fx.sample_trajectories(
            model, ddim, steps=STEPS, samples=64, batch_size=16, keep=8, sampler=sampler, seed=seed
        ),
    )
    return batches


def measured_elsewhere(config: QuantizationConfig, sampler: str, seed: int) -> tuple[Path, dict[str, Any]] | None:
    """The quality benchmark's program of the same configuration, and what it took to make."""
    for file in sorted((QUALITY / "cells").glob(f"*-s{seed}.json")) if sampler == "uniform" else ():
        cell = json.loads(file.read_text(encoding="utf-8"))
        program = QUALITY / "programs" / file.stem
        if program.is_dir() and QuantizationConfig.from_dict(cell["config"]) == config:
            return program, {name: cell[name] for name in ("seconds", "peak_bytes")}
    return None


def quantized(
    captured: fx.GraphModule,
    ddim: Any,
    batches: list[dict[str, Any]],
    config: QuantizationConfig,
    sampler: str,
    seed: int,
) -> tuple[QuantizedProgram, Path, dict[str, Any]]:
    """The program of a configuration, made at most once, with the time and memory that it took."""
    found = measured_elsewhere(config, sampler, seed)
    identity = json.dumps([config.to_dict(), sampler, seed], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    path, about = WORK / "programs" / key, WORK / "programs" / f"{key}.json"
    if found is None and about.is_file():
        found = path, json.loads(about.read_text(encoding="utf-8"))
    if found is not None:
        return tfmq_fx.load(found[0]), *found
    wall, cpu = time.perf_counter(), time.process_time()
    prepared = tfmq_fx.prepare(captured, config, timesteps=ddim.timesteps)
    tfmq_fx.calibrate(prepared, batches, progress=False)
    if config.resolved_reconstruction is not None:
        tfmq_fx.reconstruct(prepared, batches, directory=WORK / "state" / key, progress=False)
    program = tfmq_fx.convert(prepared)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    made = {"seconds": seconds, "peak_bytes": peak}
    tfmq_fx.save(program, path)
    write_json(about, made)
    return program, path, made


@torch.no_grad()
def walk(denoiser: Denoiser, scheduler: Any, noise: Tensor, eta: float, seed: int) -> Trajectory:
    """Sample with any scheduler, wrapped or not, and keep every state."""
    generator = torch.Generator().manual_seed(seed)
    x, states = noise, [noise]
    for timestep in scheduler.timesteps:
        prediction = predicted(denoiser(x, timestep), x.shape[1])
        x = scheduler.step(prediction, timestep, x, eta=eta, generator=generator).prev_sample
        states.append(x)
    return Trajectory(scheduler.timesteps.double(), torch.stack(states))


def samplers(
    preset: Preset, ddim: Any, model: Any, program: QuantizedProgram, batches: list[dict[str, Any]]
) -> dict[str, Callable[[float], Any]]:
    """The schedulers that a preset is sampled with, by what their measures are called after, made for an eta.

    Noise statistics and ranges are those of the calibration batches, whatever eta.
    """
    plain: Callable[[float], Any] = lambda eta: ddim  # noqa: E731
    if preset.corrects_noise:
        reference = tfmq_fx.lower(program, backend="reference")
        found = collect_noise_statistics(model, reference, ddim, batches, steps=STEPS)
        return {"": lambda eta: PTQDScheduler(ddim, dataclasses.replace(found, eta=eta)), "_unwrapped": plain}
    if preset.quantizes_sample:
        ranges = collect_sample_ranges(ddim, batches, steps=STEPS)
        return {"": lambda eta: QuantizedSampleScheduler(ddim, ranges), "_unwrapped": plain}
    return {"": plain}


def measure(name: str, bits: str, seed: int, samples: int) -> None:
    """Measure one cell."""
    preset = find_preset(name)
    model, scheduler = load_model(None)
    ddim = ddim_scheduler(scheduler, STEPS)
    captured = tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model))
    batches = calibration(model, ddim, preset.sampler, seed)
    config = configuration(name, bits, seed)
    program, path, made = quantized(captured, ddim, batches, config, preset.sampler, seed)

    float_features, features = (temporal_features(graph, ddim.timesteps) for graph in (captured, program))
    every = torch.arange(1000)
    full = find_mismatch(temporal_features(captured, every), temporal_features(program, every), "cosine")
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(1000 + seed))
    denoiser = with_temporal_features(program.graph_module, features)
    schedulers = samplers(preset, ddim, model, program, batches)
    measures: dict[str, Any] = {}
    for eta in ETAS:
        original = kept(
            WORK / "float-trajectories" / f"eta{eta:g}-s{seed}-{samples}.pt",
            lambda eta=eta: walk(graph_denoiser(captured), ddim, noise, eta, seed),
        )
        for suffix, sampler in schedulers.items():
            deviation = trajectory_deviation(original, walk(denoiser, sampler(eta), noise, eta, seed))
            measures[f"eta{eta:g}{suffix}"] = {"psnr": deviation.psnr.tolist(), "deviation": deviation.mean.tolist()}
    cell = {
        "preset": name,
        "bits": bits,
        "seed": seed,
        "samples": samples,
        **compare_features(float_features, features),
        "mismatch_every_timestep": mismatch_entry(full),
        **measures,
        **made,
        "artefact_bytes": path_bytes(path),
        "config": config.to_dict(),
        "torch": torch.__version__,
    }
    write_json(cell_file(name, bits, seed), cell)


def psnr(cell: dict[str, Any], name: str) -> float | None:
    """Mean PSNR of one of a cell's sampling runs."""
    return statistics.mean(cell[name]["psnr"]) if name in cell else None


COLUMNS: dict[str, tuple[Callable[[dict[str, Any]], float | None], Callable[[float], str]]] = {
    "PSNR, dB": (lambda c: psnr(c, "eta0"), "{:.1f}".format),
    "eta 1": (lambda c: psnr(c, "eta1"), "{:.1f}".format),
    "plain sampler": (lambda c: psnr(c, "eta0_unwrapped"), "{:.1f}".format),
    "plain, eta 1": (lambda c: psnr(c, "eta1_unwrapped"), "{:.1f}".format),
    "deviation": (lambda c: c["eta0"]["deviation"][-1], "{:.3f}".format),
    "relative feature error": (lambda c: c["feature_error"], "{:.4f}".format),
    "feature cosine": (lambda c: (c.get("feature_cosine") or {}).get("mean"), "{:.5f}".format),
    "right t, all 1000": (lambda c: c["mismatch_every_timestep"]["right"], "{:.1%}".format),
    "CPU s": (lambda c: c["seconds"]["cpu"], "{:.0f}".format),
}


def row(cells: list[dict[str, Any]]) -> list[str]:
    """A line of the table: means over the seeds."""
    shown = []
    for read, text in COLUMNS.values():
        values = [value for cell in cells if (value := read(cell)) is not None]
        shown.append(text(statistics.mean(values)) if values else "")
    return shown


def report() -> None:
    """Print the table, best first, as Markdown too, and write the JSON."""
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((WORK / "cells").glob("*.json"))]
    table = Table("bits", "preset", "seeds", *COLUMNS)
    lines = [f"| {' | '.join(('bits', 'preset', 'seeds', *COLUMNS))} |", "|" + "---|" * (3 + len(COLUMNS))]
    for bits in BITS:
        groups = {name: [c for c in cells if (c["preset"], c["bits"]) == (name, bits)] for name in PRESETS}
        found = {name: group for name, group in groups.items() if group}
        best = sorted(found, key=lambda name: -statistics.mean(psnr(cell, "eta0") or 0.0 for cell in found[name]))
        for name in best:
            shown = [bits, name, str(len(found[name])), *row(found[name])]
            table.add_row(*shown)
            lines.append(f"| {' | '.join(shown)} |")
    Console(width=180).print(table)
    print("\n".join(lines))
    print()
    print("\n".join(f"- `{name}` ({preset.source}): {preset.summary}" for name, preset in PRESETS.items()))
    write_json(RESULT, {"date": datetime.now(UTC).date().isoformat(), "steps": STEPS, "cells": cells})


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--bits", nargs="+", choices=["W8A8", "W4A8"], default=["W8A8", "W4A8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=16, help="trajectories compared with the float model's")
    parser.add_argument("--threads", type=int, default=1, help="threads of each cell")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--cell", action="store_true", help="measure in this process")
    options = parser.parse_args()
    todo = [(preset, bits, seed) for seed in options.seeds for bits in options.bits for preset in options.presets]
    if options.cell:
        for cell in todo:
            measure(*cell, options.samples)
        return
    # One after the other: presets share programs and the state of their reconstruction.
    for preset, bits, seed in [] if options.report else todo:
        if cell_file(preset, bits, seed).is_file():
            continue
        command = [sys.executable, __file__, "--cell", "--presets", preset, "--bits", bits, "--seeds", str(seed)]
        command.append(f"--samples={options.samples}")
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        print(f"{preset}, {bits}, seed {seed}", flush=True)
        if subprocess.run(command, env=environment).returncode:
            print(f"{preset} {bits} seed {seed} failed", file=sys.stderr)
    report()


if __name__ == "__main__":
    main()
