"""TIAR on a temporal block of the size of Stable Diffusion 1.5's: time and memory.

The block alone, with random weights: sinusoid of 320, two linears to 1,280, and 22 embedding layers with 20,160
outputs, 27.9 M parameters, over 50 timesteps of a DDIM schedule.

    python benchmarks/tiar_scale.py --iterations 2000 --json benchmarks/results/tiar_scale.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx.diagnostics import temporal_feature_error, temporal_features

#: Output channels of the 22 residual blocks of Stable Diffusion 1.5: encoder, middle, decoder.
WIDTHS = (*[320] * 2, *[640] * 2, *[1280] * 4, *[1280] * 2, *[1280] * 6, *[640] * 3, *[320] * 3)
CHANNELS, EMBEDDING = 320, 1280


class TemporalBlock(nn.Module):
    """The time path of the UNet; the sample only meets its features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(CHANNELS, EMBEDDING)
        self.linear_2 = nn.Linear(EMBEDDING, EMBEDDING)
        self.projections = nn.ModuleList(nn.Linear(EMBEDDING, width) for width in WIDTHS)

    def forward(self, sample: Tensor, timestep: Tensor) -> list[Tensor]:
        """``sample`` ``[N, 1]`` plus each temporal feature ``[N, C_i]``."""
        half = CHANNELS // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = timestep[:, None].float() * frequencies[None]
        emb = self.linear_2(nn.functional.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], 1))))
        return [sample + projection(nn.functional.silu(emb)) for projection in self.projections]


def peak_bytes() -> int:
    """Most memory that this process has taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Build, reconstruct, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="of the training")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = TemporalBlock().eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    captured = tfmq_fx.capture(model, (torch.zeros(2, 1), torch.tensor([0, 20])))
    del model
    timesteps = torch.arange(0, 1000, 20)
    before_stage = peak_bytes()
    config = tfmq_fx.QuantizationConfig(weight_bits=options.weight_bits, keep_float=())
    prepared = tfmq_fx.prepare(captured, config, timesteps=timesteps)
    tfmq_fx.calibrate(prepared, [(torch.zeros(50, 1), timesteps)], progress=False)
    rounded = tfmq_fx.convert(prepared)
    original = temporal_features(captured, timesteps)
    nearest = temporal_feature_error(original, temporal_features(rounded, timesteps)).overall
    del rounded
    began, cpu = time.perf_counter(), time.process_time()
    learning = tfmq_fx.ReconstructionConfig(
        granularity="none", temporal_iterations=options.iterations, temporal_precision=options.precision
    )
    report = tfmq_fx.reconstruct(prepared, config=learning)
    result = {
        "parameters": parameters,
        "iterations": options.iterations,
        "weight_bits": options.weight_bits,
        "precision": options.precision,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before_stage,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "loss": {"nearest": report.units[0].before, "reconstructed": report.units[0].after},
        "feature_error_nearest": nearest,
    }
    learned = temporal_features(tfmq_fx.convert(prepared), timesteps)
    result["feature_error"] = temporal_feature_error(original, learned).overall
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
