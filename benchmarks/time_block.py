"""The temporal block alone at W4A8: what its rounding, and FSC at the same rounding, are worth in images.

    python benchmarks/time_block.py run       # every cell that is not measured yet
    python benchmarks/time_block.py report    # the table, and benchmarks/results/time_block.json

A cell is a model, a method, a draw, and FSC or one range for all timesteps at the very same integers. The draw is the
seed of reconstruction: it decides the probes of the prediction and the order of channels, or the mini-batches of
training. Calibration data and the noise of the compared images are the same in all cells. A cell's quantized temporal
features are put into the float model, and 16 images of 50 DDIM steps are held against the float model's. Integers are
chosen under FSC; ranges of either kind are the exact ones behind them. ``prediction error`` is the relative squared
error of single noise predictions on the float trajectories of these images. GPTQ draws nothing, so it has one draw. The
emoji model lies beside the repository, in ``../shared``; without it, its cells are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from quality_cells import kept, write_json
from quality_features import compare_features, mismatch_entry
from rich.console import Console
from rich.table import Table
from torch import fx
from trained_models import EMOJI_MODEL, load_emoji_model

import tfmq_fx
from tfmq_fx.cli.example_inputs import unconditional_inputs
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.data.prediction import predicted
from tfmq_fx.diagnostics import (
    find_mismatch,
    graph_denoiser,
    record_trajectory,
    temporal_features,
    trajectory_deviation,
    with_temporal_features,
)
from tfmq_fx.diagnostics.comparison import ddim_scheduler
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, insert_fake_quantizers
from tfmq_fx.passes.support.timestep_values import distinct_timesteps
from tfmq_fx.reconstruction.time_path import temporal_quantizers, temporal_unit
from tfmq_fx.temporal.domain import schedule_domain

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "time_block"
STEPS, IMAGES = 50, 16
MODELS = {"bundled": lambda: load_model(None), "emoji": load_emoji_model}
#: What chooses the rounding of the temporal block; None: to nearest.
METHODS: dict[str, dict[str, Any] | None] = {
    "nearest": None,
    "GPTQ, features": {"method": "gptq", "granularity": "none"},
    "TIAR, features": {"granularity": "none", "temporal_objective": "features", "temporal_iterations": 4000},
    "TIAR, prediction": {"granularity": "none", "temporal_objective": "prediction"},
    "float weights": None,
}
#: Weight bits where they are not 4.
BITS = {"float weights": 32}
#: One range per timestep, or one for all.
RANGES = ("fsc", "shared")
#: Methods that draw nothing.
FIXED = ("nearest", "GPTQ, features", "float weights")


def cell_file(model: str, method: str, draw: int, ranges: str) -> Path:
    """Where a cell lies."""
    return WORK / "cells" / f"{model}-{method.replace(', ', '-').replace(' ', '-')}-d{draw}-{ranges}.json"


def calibrated(captured: fx.GraphModule, ddim: Any, batches: Any, temporal: str, weight_bits: int) -> fx.GraphModule:
    """The calibrated graph with fake quantizers."""
    config = tfmq_fx.QuantizationConfig(
        weight_bits=weight_bits, temporal=temporal, weight_range="mse", activation_groups=None
    )
    prepared = tfmq_fx.prepare(captured, config, timesteps=ddim.timesteps)
    # The temporal block sees every timestep; what else batches calibrate is not looked at.
    tfmq_fx.calibrate(prepared, batches[:1], progress=False)
    return prepared


def temporal_weights(prepared: fx.GraphModule) -> list[AdaRoundQuantizer]:
    """The quantizers of the temporal block's weights, in the order of the graph."""
    return [q for q in temporal_quantizers(prepared).values() if isinstance(q, AdaRoundQuantizer)]


class Measure:
    """Holds temporal features against the float model's."""

    def __init__(self, name: str, captured: fx.GraphModule, ddim: Any, channels: int) -> None:
        self.captured, self.ddim, self.denoise = captured, ddim, graph_denoiser(captured)
        self.noise = torch.randn(IMAGES, channels, 32, 32, generator=torch.Generator().manual_seed(1000))
        self.reference = kept(
            WORK / "float-trajectories" / f"{name}.pt",
            lambda: record_trajectory(self.denoise, ddim, steps=STEPS, noise=self.noise),
        )
        self.features = temporal_features(captured, ddim.timesteps)
        self.every = temporal_features(captured, torch.arange(1000))

    def of(self, program: Any) -> dict[str, Any]:
        """All measures of a program's temporal features."""
        features = temporal_features(program, self.ddim.timesteps)
        denoise = with_temporal_features(self.captured, features)
        images = record_trajectory(denoise, self.ddim, steps=STEPS, noise=self.noise)
        every = find_mismatch(self.every, temporal_features(program, torch.arange(1000)))
        return {
            **compare_features(self.features, features),
            "mismatch_every_timestep": mismatch_entry(every),
            "psnr": trajectory_deviation(self.reference, images).psnr.tolist(),
            "prediction_error": self.prediction_error(denoise),
        }

    @torch.no_grad()
    def prediction_error(self, denoise: Any) -> float:
        """Relative squared error of one prediction: its mean over the steps of the first images' float trajectories."""
        errors = []
        for step, timestep in enumerate(self.ddim.timesteps):
            x = self.reference.states[step][:4]
            ours, theirs = (predicted(run(x, timestep), x.shape[1]) for run in (denoise, self.denoise))
            errors.append(((ours - theirs).square().sum() / theirs.square().sum()).item())
        return statistics.fmean(errors)


def rounded(name: str, method: str, draw: int, captured: fx.GraphModule, ddim: Any, batches: Any) -> dict[str, Any]:
    """The integers and scales that a method chooses under FSC, and the seconds that it takes."""
    prepared = calibrated(captured, ddim, batches, "fsc", BITS.get(method, 4))
    began = time.perf_counter()
    if (config := METHODS[method]) is not None:
        tfmq_fx.reconstruct(prepared, batches, {**config, "seed": draw}, progress=False)
    seconds = time.perf_counter() - began
    insert_fake_quantizers(prepared)
    weights = temporal_weights(prepared)
    return {"seconds": seconds, "up": [weight.up for weight in weights], "scales": [weight.scale for weight in weights]}


def measure_cell(name: str, method: str, draw: int, ranges: str) -> None:
    """Round the temporal block, or take what was chosen before, and measure it."""
    model, scheduler = MODELS[name]()
    ddim = ddim_scheduler(scheduler, STEPS)
    captured = tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model))
    batches = kept(
        WORK / "calibration" / f"{name}.pt",
        lambda: tfmq_fx.sample_trajectories(model, ddim, steps=STEPS, samples=64, batch_size=16, keep=8, seed=0),
    )
    file = cell_file(name, method, draw, ranges)
    chosen = kept(
        WORK / "roundings" / f"{cell_file(name, method, draw, 'fsc').stem}.pt",
        lambda: rounded(name, method, draw, captured, ddim, batches),
    )
    prepared = calibrated(captured, ddim, batches, ranges, BITS.get(method, 4))
    insert_fake_quantizers(prepared)
    for quantizer, up, scale in zip(temporal_weights(prepared), chosen["up"], chosen["scales"], strict=True):
        quantizer.up, quantizer.scale = up, scale
    domain = schedule_domain(prepared, "timestep", distinct_timesteps(ddim.timesteps))
    temporal_unit(prepared, domain).observe(prepared)
    measure = Measure(name, captured, ddim, unconditional_inputs(model)["sample"].shape[1])
    about = {"model": name, "method": method, "draw": draw, "ranges": ranges, "seconds": chosen["seconds"]}
    write_json(file, {**about, **measure.of(tfmq_fx.convert(prepared))})


def report() -> None:
    """Print the means over draws, and write all cells."""
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((WORK / "cells").glob("*.json"))]
    table = Table("model", "method", "ranges", "draws", "PSNR, dB", "worst draw", "prediction error", "feature error",
                  "mismatch", "right of all 1,000", "seconds", title="temporal block alone, W4A8")  # fmt: skip
    for name in MODELS:
        for method in METHODS:
            for ranges in RANGES:
                key = (name, method, ranges)
                measures = [cell for cell in cells if (cell["model"], cell["method"], cell["ranges"]) == key]
                if not measures:
                    continue
                psnr = [statistics.fmean(entry["psnr"]) for entry in measures]
                table.add_row(
                    name, method, ranges, str(len(measures)), f"{statistics.fmean(psnr):.1f}", f"{min(psnr):.1f}",
                    f"{statistics.fmean(entry['prediction_error'] for entry in measures):.2g}",
                    f"{statistics.fmean(entry['feature_error'] for entry in measures):.4f}",
                    f"{max(entry['mismatch']['mean'] for entry in measures):.3g}",
                    f"{min(entry['mismatch_every_timestep']['right'] for entry in measures):.2%}",
                    f"{statistics.fmean(cell['seconds'] for cell in measures):.0f}",
                )  # fmt: skip
    Console().print(table)
    write_json(ROOT / "benchmarks" / "results" / "time_block.json", {"steps": STEPS, "images": IMAGES, "cells": cells})


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "report"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--ranges", nargs="+", choices=RANGES, default=RANGES)
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2, 3])
    options = parser.parse_args()
    if options.stage == "report":
        report()
        return
    for draw in options.draws:
        for name in options.models:
            if name == "emoji" and not EMOJI_MODEL.is_dir():
                print(f"the emoji model is not there ({EMOJI_MODEL}): its cells are left out")
                continue
            for method in options.methods:
                for ranges in options.ranges if draw == 0 or method not in FIXED else ():
                    if not cell_file(name, method, draw, ranges).is_file():
                        measure_cell(name, method, draw, ranges)
                        print(f"{name}, {method}, draw {draw}, {ranges}", flush=True)


if __name__ == "__main__":
    main()
