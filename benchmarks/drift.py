"""What the correction of drift is worth, beside PTQD's: PSNR of whole images, models x configurations x seeds.

    python benchmarks/drift.py run       # cells that are not measured yet, and results/drift.json
    python benchmarks/drift.py report    # the table: means over seeds, differences paired image by image

16 images of 50 deterministic DDIM steps are held against the float model's from the same noise, with the plain sampler
and with each correction. A seed decides the calibration trajectories, which PTQD's statistics are taken from too, the
32 trajectories of other noise that the drift is fitted on, and the noise of the images, which is neither's. Results are
kept cell by cell, so a run that was cut off goes on where it stopped. Without the emoji model it is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from presets import walk
from quality_cells import write_json
from quality_models import MODELS, models_there
from rich.progress import track

import tfmq_fx
from tfmq_fx.diagnostics import trajectory_deviation
from tfmq_fx.schedulers import (
    DriftCorrectedScheduler,
    PTQDScheduler,
    collect_drift_correction,
    collect_noise_statistics,
)

RESULTS = Path(__file__).resolve().parent / "results" / "drift.json"
IMAGES, FITTED, FIT_SEED = 16, 32, 9000
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "W4A8, nearest": {"weight_bits": 4, "reconstruction": "nearest"},
    "W4A8": {"weight_bits": 4},
    "W8A8": {},
}
PLAIN, SAMPLERS = "plain", ("plain", "PTQD", "drift")


def measure(name: str, configuration: str, seed: int) -> dict[str, Any]:
    """One cell."""
    quality_model = MODELS[name]
    model, scheduler = quality_model.load()
    ddim = quality_model.sampler(scheduler)
    batches = quality_model.calibration(model, ddim, seed)
    config = tfmq_fx.QuantizationConfig(**CONFIGURATIONS[configuration])
    program = tfmq_fx.quantize(model, config, batches, timesteps=ddim.timesteps, progress=False)
    denoiser = tfmq_fx.lower(program)
    began = time.perf_counter()
    drift = collect_drift_correction(
        model, denoiser, ddim, steps=quality_model.steps, samples=FITTED, seed=FIT_SEED + seed, progress=False
    )
    seconds = time.perf_counter() - began
    statistics = collect_noise_statistics(model, denoiser, ddim, batches, steps=quality_model.steps)
    noise = quality_model.noise(IMAGES, seed)
    original = walk(model, ddim, noise, 0.0, seed)
    psnr = {}
    for sampler, corrected in zip(
        SAMPLERS, (ddim, PTQDScheduler(ddim, statistics), DriftCorrectedScheduler(ddim, drift)), strict=True
    ):
        each = trajectory_deviation(original, walk(denoiser, corrected, noise, 0.0, seed)).psnr
        psnr[sampler] = [round(float(value), 3) for value in each]
    return {
        "model": name,
        "configuration": configuration,
        "seed": seed,
        "gain": round(drift.gain, 3),
        "seconds": round(seconds, 1),
        "psnr": psnr,
    }


def run(seeds: list[int], configurations: list[str], models: list[str]) -> None:
    """Measure what is missing."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cells": []}
    done = [(cell["model"], cell["configuration"], cell["seed"]) for cell in kept["cells"]]
    wanted = [(name, row, seed) for seed in seeds for row in configurations for name in models_there(models)]
    for cell in track([cell for cell in wanted if cell not in done], "measuring"):
        kept["cells"].append(measure(*cell))
        kept.update(images=IMAGES, fitted=FITTED, torch=torch.__version__, machine=platform.machine())
        write_json(RESULTS, kept)


def report() -> None:
    """Print the table."""
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    print("| model | configuration | seeds | sampler | PSNR, dB | worst seed | worst image | to plain, paired |")
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for row in CONFIGURATIONS:
            own = [cell for cell in cells if (cell["model"], cell["configuration"]) == (name, row)]
            for sampler in SAMPLERS if own else ():
                psnr, plain = (torch.tensor([cell["psnr"][key] for cell in own]) for key in (sampler, PLAIN))
                gain = (psnr - plain).flatten()
                paired = "" if sampler == PLAIN else f"{gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f}"
                numbers = f"{psnr.mean():.1f} | {psnr.mean(1).min():.1f} | {psnr.min():.1f} | {paired}"
                print(f"| {name} | {row} | {len(own)} | {sampler} | {numbers} |")


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--model", nargs="+", choices=["bundled", "emoji"], default=["bundled", "emoji"])
    options = parser.parse_args()
    if options.command == "run":
        run(options.seeds, options.configurations, options.model)
    else:
        report()


if __name__ == "__main__":
    main()
