"""One parameter set per timestep (FSC) against one for all, at several widths of the temporal activations.

The bundled model, 4-bit weights, the temporal block alone: its feature error needs no image and no random number, so
there is one value per case. Rounded to nearest, and after TIAR.

    python benchmarks/temporal_bits.py --json benchmarks/results/temporal_bits.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tfmq_fx
from tfmq_fx.cli.example_inputs import unconditional_inputs
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.diagnostics import temporal_feature_error, temporal_features
from tfmq_fx.diagnostics.comparison import ddim_scheduler

STEPS = 50


def feature_error(captured: Any, timesteps: Any, temporal: str, bits: int, iterations: int) -> float:
    """Relative error of all temporal features over the schedule; no iterations: rounded to nearest."""
    layers = [layer.fqn for layer in tfmq_fx.find_temporal_block(captured).embedding_layers]
    names = ["time_embedding.*", *layers]
    config = tfmq_fx.QuantizationConfig(
        weight_bits=4, temporal=temporal, overrides={name: {"activation_bits": bits} for name in names}
    )
    prepared = tfmq_fx.prepare(captured, config, timesteps=timesteps)
    noise = torch.randn(len(timesteps), 1, 32, 32, generator=torch.Generator().manual_seed(0))
    # The temporal block sees every timestep; what else the batch calibrates is not looked at.
    tfmq_fx.calibrate(prepared, [(noise, timesteps)], progress=False)
    if iterations:
        learning = tfmq_fx.ReconstructionConfig(granularity="none", temporal_iterations=iterations)
        tfmq_fx.reconstruct(prepared, config=learning, progress=False)
    quantized = temporal_features(tfmq_fx.convert(prepared), timesteps)
    return temporal_feature_error(temporal_features(captured, timesteps), quantized).overall


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4000, help="of TIAR")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4], help="of the temporal activations")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, scheduler = load_model(None)
    timesteps = ddim_scheduler(scheduler, STEPS).timesteps
    captured = tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model))
    table = Table("rounding", "temporal activations", "one range", "FSC", title="relative feature error")
    rows = []
    cases = list(itertools.product((0, options.iterations), options.bits))
    for iterations, bits in track(cases, "cases"):
        errors = {t: feature_error(captured, timesteps, t, bits, iterations) for t in ("shared", "fsc")}
        rows.append({"iterations": iterations, "bits": bits, **errors})
        label = f"TIAR, {iterations} iterations" if iterations else "nearest"
        table.add_row(label, f"{bits} bits", f"{errors['shared']:.4f}", f"{errors['fsc']:.4f}")
    Console().print(table)
    if options.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
