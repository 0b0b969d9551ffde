"""W4A8: rounded by GPTQ, and trained as a whole behind it: PSNR of whole images, models x methods x seeds.

    python benchmarks/four_bits.py run                                     # what is missing: hours on two cores
    python benchmarks/four_bits.py run --models emoji --seeds 0 --rows "GPTQ" "distillation, 1500 x 16"
    python benchmarks/four_bits.py report

Images as in ``eight_bits.py``. Calibration and training see all 50 steps of 32 trajectories. Results are kept cell by
cell, and a training goes on where it stopped, from its state in ``runs/four_bits``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from eight_bits import IMAGES, MODELS, SEEDS, STEPS, sampled
from low_bit import psnr
from trained_models import EMOJI_MODEL

import tfmq_fx
from tfmq_fx.diagnostics.comparison import ddim_scheduler

ROOT = Path(__file__).resolve().parents[1]
RESULTS, WORK = ROOT / "benchmarks" / "results" / "four_bits.json", ROOT / "runs" / "four_bits"
TRAJECTORIES = 32

#: Reconstruction, by row.
ROWS: dict[str, Any] = {
    "GPTQ": "gptq",
    "distillation, 3000 x 32": "distillation",
    "distillation, 1500 x 16": {
        "method": "distillation", "iterations": 1500, "batch_size": 16, "step_learning_rate": 5e-3,
    },
    "efficientdm, 1000 x 16": "efficientdm",
}  # fmt: skip


def measure(model_name: str, row: str, seed: int) -> dict[str, Any]:
    """One cell."""
    model, scheduler = MODELS[model_name]()
    shape = (int(model.config["in_channels"]), int(model.config["sample_size"]))
    batches = tfmq_fx.sample_trajectories(
        model, scheduler, steps=STEPS, samples=TRAJECTORIES, batch_size=TRAJECTORIES, keep=TRAJECTORIES, seed=seed,
        progress=False,
    )  # fmt: skip
    steps, began = ddim_scheduler(scheduler, STEPS), time.perf_counter()
    config = tfmq_fx.QuantizationConfig(weight_bits=4, reconstruction=ROWS[row])
    state = WORK / f"{model_name}-{row.replace(', ', '-').replace(' ', '')}-{seed}"
    program = tfmq_fx.quantize(model, config, batches, timesteps=steps.timesteps, directory=state)
    seconds = time.perf_counter() - began
    each = psnr(sampled(tfmq_fx.lower(program), scheduler, *shape, seed), sampled(model, scheduler, *shape, seed))
    return {
        "model": model_name, "row": row, "seed": seed, "psnr": [round(float(value), 3) for value in each],
        "seconds": round(seconds), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(), "images": IMAGES, "steps": STEPS,
    }  # fmt: skip


def run(models: list[str], rows: list[str], seeds: list[int]) -> None:
    """Measure what is missing."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": []}
    done = [(cell["model"], cell["row"], cell["seed"]) for cell in kept["cells"]]
    if "emoji" in models and not EMOJI_MODEL.is_dir():
        print(f"the emoji model is not at {EMOJI_MODEL}: it is left out")
        models = [name for name in models if name != "emoji"]
    for cell in [(name, row, seed) for row in rows for seed in seeds for name in models]:
        if cell not in done:
            kept["cells"].append(measure(*cell))
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def report() -> None:
    """Print the table."""
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    print("| model | row | seeds | PSNR, dB | worst seed | worst image | minutes |\n|---|---|---|---|---|---|---|")
    for name in MODELS:
        for row in ROWS:
            own = [cell for cell in cells if (cell["model"], cell["row"]) == (name, row)]
            if own:
                each = torch.tensor([cell["psnr"] for cell in own])
                minutes = sum(cell["seconds"] for cell in own) / len(own) / 60
                figures = f"{each.mean():.1f} | {each.mean(1).min():.1f} | {each.min():.1f} | {minutes:.0f}"
                print(f"| {name} | {row} | {len(own)} | {figures} |")


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["GPTQ", "distillation, 3000 x 32"])
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    options = parser.parse_args()
    if options.command == "run":
        run(options.models, options.rows, options.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
