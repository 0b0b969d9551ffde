"""What each pass of our integer kernels is worth: the same program without it, all variants timed in turn.

    python benchmarks/kernel_passes.py                       # the cifar UNet at batches 1 and 4
    python benchmarks/kernel_passes.py --report              # the table of benchmarks/results/kernel_passes.json

Each variant is lowered once, for every batch. A ratio is that of one round to the full pipeline in the same round;
printed are its median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing.machine import machine
from timing.unets import UNETS

import tfmq_fx
from tfmq_fx.passes import NATIVE_KERNELS, observe_passes

RESULTS = Path(__file__).parent / "results" / "kernel_passes.json"
FULL = "all of them"
#: What puts a graph on our kernels: the passes of the pipeline that no other stage uses.
KERNELS = tuple(pass_id for pass_id in NATIVE_KERNELS.ids if pass_id.split("::")[1].startswith(("lower_", "fuse_")))
#: The passes that each variant leaves out.
VARIANTS: dict[str, tuple[str, ...]] = {
    FULL: (),
    "without `FuseGroupNorms`": ("tfmq::fuse_group_norms",),
    "without `FuseQuantizedImages`": ("tfmq::fuse_quantized_images",),
    "without `FuseResidualAdds`": ("tfmq::fuse_residual_adds",),
    "without `LowerIntegerAttention`": ("tfmq::lower_integer_attention",),
    "without `NarrowActivations` (f32 between the kernels)": ("tfmq::narrow_activations",),
    "oneDNN's kernels instead of ours": (*KERNELS, "tfmq::narrow_activations"),
}


def lower(program: tfmq_fx.QuantizedProgram, variant: str) -> Callable[..., Any]:
    """The program, lowered without the passes of ``variant``."""
    with observe_passes(skip=VARIANTS[variant]):
        return tfmq_fx.lower(program)


def quantize(name: str) -> tfmq_fx.QuantizedProgram:
    """W8A8 with the default configuration, calibrated on a little noise: only the time is looked at."""
    unet = UNETS[name]
    timesteps = unet.schedule().timesteps
    batches = [{**unet.normal(4, seed), "timestep": timesteps[seed::12][:4]} for seed in range(2)]
    return tfmq_fx.quantize(unet.build(), None, batches, timesteps=timesteps, progress=False)


@torch.no_grad()
def seconds(runs: Mapping[str, Callable[..., Any]], name: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after three rounds that do not count."""
    inputs = {**UNETS[name].normal(batch, 9), "timestep": UNETS[name].schedule().timesteps[20]}
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in range(rounds + 3):
        for variant, run in runs.items():
            began = time.perf_counter()
            run(**inputs)
            times[variant].append(time.perf_counter() - began)
    return {variant: values[3:] for variant, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def markdown(content: Mapping[str, Any]) -> str:
    """A row a variant, a column a batch."""
    cells = content["cells"]
    header = " | ".join(f"batch {batch}: ms | × the time" for batch in cells)
    lines = [f"| {content['unet']} | {header} |", "|---|" + "---|---|" * len(cells)]
    for variant in VARIANTS:
        entries = []
        for rows in cells.values():
            time_of, ratio = rows[variant]["seconds"], rows[variant]["ratio"]
            entries.append(f"{1e3 * time_of['median']:.1f}")
            entries.append(f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
        lines.append(f"| {variant} | {' | '.join(entries)} |")
    return "\n".join(lines)


def main() -> None:
    """Lower every variant, time them in turn, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=list(UNETS), default="cifar")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        program = quantize(options.unet)
        runs = {variant: lower(program, variant) for variant in VARIANTS}
        about = machine(sorted(os.sched_getaffinity(0)), torch.get_num_threads())
        content: dict[str, Any] = {**about, "unet": options.unet, "rounds": options.rounds, "cells": {}}
        for batch in options.batches:
            times = seconds(runs, options.unet, batch, options.rounds)
            content["cells"][str(batch)] = {
                variant: {
                    "seconds": spread(values),
                    "ratio": spread([a / b for a, b in zip(values, times[FULL], strict=True)]),
                }
                for variant, values in times.items()
            }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(markdown(json.loads(options.json.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
