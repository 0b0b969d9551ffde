"""What each part of the W8A8 default is worth: PSNR of whole images and errors of one prediction, models x seeds.

    python benchmarks/eight_bits.py run       # cells that are not measured yet, and results/eight_bits.json
    python benchmarks/eight_bits.py report    # the table: means over seeds, and paired differences to the default

16 images of 50 DDIM steps from the noise of the float model's; a seed decides the calibration trajectories and that
noise. Differences are paired image by image, with their standard error over all images of all seeds. Results are kept
cell by cell, so a run that was cut off goes on where it stopped. Without the emoji model it is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from low_bit import psnr
from rich.progress import track
from torch import Tensor
from trained_models import EMOJI_MODEL, load_emoji_model

import tfmq_fx
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.data.prediction import predicted
from tfmq_fx.diagnostics.comparison import ddim_scheduler

RESULTS = Path(__file__).resolve().parent / "results" / "eight_bits.json"
STEPS, IMAGES, SEEDS, NOISE_SEED = 50, 16, (0, 1, 2), 5000

#: Fields on top of the default, by row.
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "one range for all timesteps": {"activation_groups": 1},
    "channels not scaled": {"scale_channels": False},
    "softmax divided before": {"defer_softmax": False},
    "shortcuts at 8 bits": {"shortcut_bits": None},
    "none of the four": {
        "activation_groups": 1, "scale_channels": False, "defer_softmax": False, "shortcut_bits": None,
    },
    "weights rounded by GPTQ": {"reconstruction": "gptq"},
}  # fmt: skip
MODELS = {"bundled": load_model, "emoji": load_emoji_model}


@torch.no_grad()
def sampled(denoise: Any, scheduler: Any, channels: int, size: int, seed: int) -> Tensor:
    """Images by DDIM from the noise of a seed, ``[16, C, H, W]``."""
    generator = torch.Generator().manual_seed(NOISE_SEED + seed)
    sample, steps = torch.randn(IMAGES, channels, size, size, generator=generator), ddim_scheduler(scheduler, STEPS)
    for timestep in steps.timesteps:
        found = predicted(denoise(sample, timestep.expand(IMAGES)), channels)
        sample = steps.step(found, timestep, sample).prev_sample
    return sample.clamp(-1, 1)


def measure(model_name: str, row: str, seed: int) -> dict[str, Any]:
    """One cell."""
    model, scheduler = MODELS[model_name]()
    shape = (int(model.config["in_channels"]), int(model.config["sample_size"]))
    batches = tfmq_fx.sample_trajectories(model, scheduler, steps=STEPS, seed=seed, progress=False)
    steps, began = ddim_scheduler(scheduler, STEPS), time.perf_counter()
    config = tfmq_fx.QuantizationConfig(**ROWS[row])
    program = tfmq_fx.quantize(model, config, batches, timesteps=steps.timesteps, progress=False)
    seconds = time.perf_counter() - began
    images = sampled(tfmq_fx.lower(program), scheduler, *shape, seed)
    each = psnr(images, sampled(model, scheduler, *shape, seed))
    return {
        "model": model_name,
        "row": row,
        "seed": seed,
        "psnr": [round(float(value), 3) for value in each],
        "seconds": round(seconds, 1),
    }


def run() -> None:
    """Measure what is missing."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": []}
    done = [(cell["model"], cell["row"], cell["seed"]) for cell in kept["cells"]]
    names = [name for name in MODELS if name != "emoji" or EMOJI_MODEL.is_dir()]
    if len(names) < len(MODELS):
        print(f"the emoji model is not at {EMOJI_MODEL}: it is left out")
    wanted = [(name, row, seed) for row in ROWS for seed in SEEDS for name in names]
    for cell in track([cell for cell in wanted if cell not in done], "measuring"):
        kept["cells"].append(measure(*cell))
        kept.update(
            images=IMAGES, steps=STEPS, threads=torch.get_num_threads(), torch=torch.__version__,
            processor=platform.processor() or platform.machine(),
        )  # fmt: skip
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def report() -> None:
    """Print the table."""
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    found = {(cell["model"], cell["row"], cell["seed"]): torch.tensor(cell["psnr"]) for cell in cells}
    print(
        "| model | row | seeds | PSNR, dB | worst seed | worst image | to the default |\n|---|---|---|---|---|---|---|"
    )
    for name in MODELS:
        for row in ROWS:
            own = {seed: found[name, row, seed] for seed in SEEDS if (name, row, seed) in found}
            if not own:
                continue
            paired = [own[seed] - found[name, "default", seed] for seed in own if (name, "default", seed) in found]
            every, gain = torch.cat([*own.values()]), torch.cat(paired) if row != "default" and paired else None
            error = "" if gain is None else f"{gain.mean():+.2f} ± {gain.std() / len(gain) ** 0.5:.2f}"
            means = [float(each.mean()) for each in own.values()]
            print(
                f"| {name} | {row} | {len(own)} | {every.mean():.1f} | {min(means):.1f} | {every.min():.1f} | {error} |"
            )


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    (run if parser.parse_args().command == "run" else report)()


if __name__ == "__main__":
    main()
