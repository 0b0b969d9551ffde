"""Hold an artefact of the bundled model against its baselines on the same calibration data.

The baselines are torchao's stock x86 recipe (``X86InductorQuantizer`` with its default configuration, every
conv and linear, ``aten.mul`` opted out because it would observe the integer timestep and raise), and the
artefact's own configuration with the temporal block left in float, and with one range for all timesteps.
All run as eager quantize/dequantize graphs from the same noise, DDIM, against the float model's images.

    python benchmarks/baselines.py --artefact demo/fashion-w8a8 --json demo/baselines.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import fx

import tfmq_fx
from tfmq_fx.cli.example_inputs import unconditional_inputs
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.diagnostics.comparison import ddim_scheduler, psnr, sample_images


def stock_program(captured: fx.GraphModule, batches: list[dict[str, Any]]) -> fx.GraphModule:
    """Quantize a copy of ``captured`` the way torchao's x86 tutorial does."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    quantizer.set_function_type_qconfig(torch.mul, None)
    prepared = prepare_pt2e(copy.deepcopy(captured), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(**batch)
    return convert_pt2e(prepared)


def main() -> None:
    """Quantize, sample, compare, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    program = tfmq_fx.load(args.artefact)
    steps = 0 if program.timesteps is None else len(program.timesteps)
    model, scheduler = load_model(None)
    ddim = ddim_scheduler(scheduler, steps)
    # The defaults of `tfmq-fx quantize`: the same batches as the artefact was calibrated on.
    batches = tfmq_fx.sample_trajectories(
        model, ddim, steps=steps, samples=args.calibration_samples, batch_size=16, keep=8, seed=0
    )
    captured = tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model))
    stock = stock_program(captured, batches)

    def call_stock(sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        with torch.no_grad():
            return stock(sample, timestep.expand(len(sample)))

    denoisers: dict[str, Any] = {"float": model, "this artefact": tfmq_fx.lower(program, "reference")}
    for temporal in ("shared", "float"):
        config = dataclasses.replace(program.config, temporal=temporal)
        prepared = tfmq_fx.prepare(captured, config, timesteps=program.timesteps)
        tfmq_fx.calibrate(prepared, batches, progress=False)
        denoisers[f"temporal={temporal!r}"] = tfmq_fx.lower(tfmq_fx.convert(prepared), "reference")
    denoisers["stock torchao x86"] = call_stock

    noise = torch.randn(args.samples, 1, 32, 32, generator=torch.Generator().manual_seed(args.seed))
    images = {}
    with Progress(transient=True) as progress:
        for name, denoiser in denoisers.items():
            task = progress.add_task(f"sampling, {name}", total=steps)
            advance = partial(progress.advance, task)
            images[name] = sample_images(denoiser, scheduler, steps=steps, noise=noise, on_step=advance)
    table = Table(
        "program", "PSNR to the float images, mean", "min", title_justify="left", title="same calibration, same noise"
    )
    result = {}
    for name in list(denoisers)[1:]:
        decibels = psnr(images["float"], images[name])
        result[name] = {"mean": decibels.mean().item(), "min": decibels.min().item()}
        table.add_row(name, f"{decibels.mean():.1f} dB", f"{decibels.min():.1f} dB")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"samples": args.samples, "steps": steps, "psnr": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
