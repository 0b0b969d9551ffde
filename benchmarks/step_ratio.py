"""How long a step of the bundled model takes with parts of the W8A8 default, relative to one range and nothing else.

    python benchmarks/step_ratio.py        # the table, and results/step_ratio.json

All programs are called in turn, round by round, each round in the other order; a ratio is taken within a round. At
batch 4 once with one timestep and once with four.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import tfmq_fx
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.diagnostics.comparison import ddim_scheduler

RESULTS = Path(__file__).resolve().parent / "results" / "step_ratio.json"
STEPS, ROUNDS, CALLS, CALIBRATED = 50, 100, 5, 8
PLAIN = {"activation_groups": 1, "scale_channels": False, "defer_softmax": False, "shortcut_bits": None}
#: Fields on top of the default; the first one is what the others are compared with.
ROWS: dict[str, dict[str, Any]] = {
    "one range, nothing else": PLAIN,
    "a range per timestep": {**PLAIN, "activation_groups": None},
    "the default with shortcuts at 8 bits": {"shortcut_bits": None},
    "the default": {},
}


def seconds_of(denoiser: tfmq_fx.Denoiser, x: Tensor, timesteps: Tensor) -> float:
    """Of one call, in the mean over some, behind one that warms the caches."""
    denoiser(x, timesteps)
    began = time.perf_counter()
    for _ in range(CALLS):
        denoiser(x, timesteps)
    return (time.perf_counter() - began) / CALLS


@torch.no_grad()
def main() -> None:
    """Measure, print, and write."""
    model, scheduler = load_model()
    steps = ddim_scheduler(scheduler, STEPS)
    batches = tfmq_fx.sample_trajectories(model, scheduler, steps=STEPS, samples=CALIBRATED, progress=False)
    denoisers = {}
    for name, fields in ROWS.items():
        config = tfmq_fx.QuantizationConfig(**fields)
        program = tfmq_fx.quantize(model, config, batches, timesteps=steps.timesteps, progress=False)
        denoisers[name] = tfmq_fx.lower(program)
    channels, size = int(model.config["in_channels"]), int(model.config["sample_size"])
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "processor": platform.processor(), "rows": []}
    print("| batch | program | ms | ratio (quartiles) |\n|---|---|---|---|")
    for label, timesteps in (
        ("1", steps.timesteps[10:11]),
        ("4", steps.timesteps[10:11].expand(4)),
        ("4, mixed timesteps", steps.timesteps[10:14]),
    ):
        x = torch.randn(len(timesteps), channels, size, size)
        times: dict[str, list[float]] = {name: [] for name in denoisers}
        for number in track(range(ROUNDS), f"batch {label}", transient=True):
            for name in list(denoisers)[:: 1 if number % 2 else -1]:
                times[name].append(seconds_of(denoisers[name], x, timesteps))
        first = next(iter(times.values()))
        for name, own in times.items():
            ratios = [mine / other for mine, other in zip(own, first, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found["rows"].append(
                {"batch": label, "program": name, "seconds": statistics.median(own), "ratio": [low, middle, high]}
            )
            print(f"| {label} | {name} | {1e3 * statistics.median(own):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
