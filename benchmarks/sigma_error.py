"""Error of the quantized sigma-conditioned model at every noise level, beside that of bfloat16.

    python benchmarks/sigma_error.py            # three seeds, and benchmarks/results/sigma_error.json

What is compared is the network's own output on the float model's trajectories, of other noise than those that it was
calibrated on. A seed decides both. Results are kept configuration by configuration, so a run that was cut off goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from trained_models import load_sigma_model

import tfmq_fx

RESULTS = Path(__file__).resolve().parent / "results" / "sigma_error.json"
STEPS, CALIBRATED, MEASURED, CLASSES = 40, 18, 16, 9
#: Noise levels of the table; the schedule's nearest are taken.
SIGMAS = (80.0, 20.0, 5.0, 1.0, 0.3, 0.05)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W8A8, channels not scaled, softmax divided before": {"scale_channels": False, "defer_softmax": False},
    "W8A8, one range, softmax divided before": {"activation_groups": 1, "defer_softmax": False},
}


@torch.no_grad()
def trajectory(model: Any, scheduler: Any, seed: int) -> list[tuple[float, Tensor, Tensor, Tensor, Tensor]]:
    """Of each step: sigma, the network's input, its timestep, the labels, and the network's output."""
    steps = copy.deepcopy(scheduler)
    steps.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.arange(MEASURED) % CLASSES
    sample = torch.randn(MEASURED, 3, 32, 32, generator=generator) * steps.init_noise_sigma
    points = []
    for number, timestep in enumerate(steps.timesteps):
        scaled = steps.scale_model_input(sample, timestep)
        output = model(scaled, timestep, class_labels=labels).sample
        points.append((float(steps.sigmas[number]), scaled, timestep, labels, output))
        sample = steps.step(output, timestep, sample).prev_sample
    return points


def errors(points: list[tuple[float, Tensor, Tensor, Tensor, Tensor]], run: Callable[..., Any]) -> dict[str, float]:
    """Relative errors by noise level."""
    found = {}
    for wanted in SIGMAS:
        sigma, x, timestep, labels, output = min(points, key=lambda point: abs(point[0] / wanted - 1))
        with torch.no_grad():
            result = run(x, timestep, class_labels=labels)
        result = result if isinstance(result, Tensor) else result.sample
        found[f"{sigma:.3g}"] = float((result.float() - output).norm() / output.norm())
    return found


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    model, scheduler = load_sigma_model()
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": []}
    kept.update(machine=platform.processor() or platform.machine(), threads=torch.get_num_threads(), steps=STEPS)
    done = {(cell["configuration"], cell["seed"]) for cell in kept["cells"]}
    wanted = [(name, seed) for seed in options.seeds for name in ("bfloat16", *CONFIGURATIONS)]
    for name, seed in track([cell for cell in wanted if cell not in done], "measuring"):
        points = trajectory(model, scheduler, seed)
        began, run = time.perf_counter(), lambda x, t, class_labels: narrow(x.bfloat16(), t, class_labels=class_labels)
        if name != "bfloat16":
            run = quantized(model, scheduler, seed, CONFIGURATIONS[name])
        seconds = time.perf_counter() - began
        kept["cells"].append(
            {"configuration": name, "seed": seed, "errors": errors(points, run), "seconds": round(seconds, 1)}
        )
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for cell in sorted(kept["cells"], key=lambda cell: (cell["seed"], cell["configuration"])):
        levels = "  ".join(f"{sigma}: {error:.4f}" for sigma, error in cell["errors"].items())
        print(f"seed {cell['seed']}  {cell['configuration']:48}  {levels}")


def quantized(model: Any, scheduler: Any, seed: int, fields: dict[str, Any]) -> Callable[..., Any]:
    """The program of a configuration."""
    labels = torch.arange(CALIBRATED) % CLASSES
    batches = tfmq_fx.sample_trajectories(
        model, scheduler, steps=STEPS, samples=CALIBRATED, batch_size=CALIBRATED, keep=8, seed=seed,
        extra={"class_labels": labels}, progress=False,
    )  # fmt: skip
    steps = copy.deepcopy(scheduler)
    steps.set_timesteps(STEPS)
    config = tfmq_fx.QuantizationConfig(**fields)
    return tfmq_fx.quantize(model, config, batches, timesteps=steps.timesteps, progress=False)


if __name__ == "__main__":
    main()
