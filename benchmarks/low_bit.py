"""W6A6 and W4A4 on the emoji model: errors, PSNR, sizes of files, and the images.

    python benchmarks/low_bit.py run       # what is not measured yet, and benchmarks/results/low_bit.json
    python benchmarks/low_bit.py report    # the table, and docs/images/low_bit.png

Images are sampled by DDIM in 50 steps from the same noise as the float model's, and calibrated on other noise. The
error is that of one noise prediction on the float model's trajectories. Results are kept row by row, with their images
in ``runs/low_bit``, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from trained_models import EMOJI_MODEL, load_emoji_model

import tfmq_fx
from tfmq_fx.data.prediction import predicted
from tfmq_fx.diagnostics.comparison import ddim_scheduler, path_bytes

ROOT = Path(__file__).resolve().parents[1]
RESULTS, WORK = ROOT / "benchmarks" / "results" / "low_bit.json", ROOT / "runs" / "low_bit"
PICTURE = ROOT / "docs" / "images" / "low_bit.png"
STEPS, CALIBRATED, KEPT, IMAGES, CHANNELS, NOISE_SEED, EVERY = 50, 32, 8, 16, 3, 777, 5

EIGHT_BITS = {"weight_bits": 8, "activation_bits": 8}
#: Preset (None: the default configuration) and the fields on top.
ROWS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "W6A6, default": (None, {"weight_bits": 6, "activation_bits": 6}),
    "W6A6, svdquant, rank 16": ("svdquant", {"weight_bits": 6, "activation_bits": 6, "low_rank": 16}),
    "W4A4, default": (None, {"weight_bits": 4, "activation_bits": 4}),
    "W4A4, svdquant, rank 16": ("svdquant", {"weight_bits": 4, "activation_bits": 4, "low_rank": 16}),
    "W4A4, svdquant, rank 16, branches at 8 bits too": (
        "svdquant",
        {
            "weight_bits": 4,
            "activation_bits": 4,
            "low_rank": 16,
            "overrides": {
                "attention": {"activation_bits": 8},
                **{
                    key: {"weight_bits": 8, "activation_bits": 8}
                    for key in ("*shortcut*", "*downsample*", "*upsample*")
                },
            },
        },
    ),
    "W4A4, svdquant without branches": ("svdquant", {"weight_bits": 4, "activation_bits": 4, "low_rank": None}),
}


def configuration(row: str) -> tfmq_fx.QuantizationConfig:
    """The configuration of a row."""
    preset, fields = ROWS[row]
    return (
        tfmq_fx.QuantizationConfig(**fields) if preset is None else tfmq_fx.QuantizationConfig.preset(preset, **fields)
    )


def file_name(row: str) -> str:
    """What a row's files are called."""
    return row.replace(", ", "-").replace(" ", "-")


@torch.no_grad()
def walk(
    denoise: Callable[[Tensor, Tensor], Any], scheduler: Any
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Sample the images; also what the denoiser was given and gave at each step."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    sample, points = torch.randn(IMAGES, CHANNELS, 32, 32, generator=generator), []
    steps = ddim_scheduler(scheduler, STEPS)
    for timestep in steps.timesteps:
        found = predicted(denoise(sample, timestep.expand(IMAGES)), CHANNELS)
        points.append((sample, timestep, found))
        sample = steps.step(found, timestep, sample).prev_sample
    return sample.clamp(-1, 1), points


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each image, in dB; pixels span 2."""
    return 10 * torch.log10(4 / (images - reference).square().flatten(1).mean(1))


def measure(row: str, model: Any, scheduler: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantize, save, and compare with the float model."""
    reference, points = walk(model, scheduler)
    file, seconds = WORK / "programs" / file_name(row), None
    if not file.is_dir():
        began, steps = time.perf_counter(), ddim_scheduler(scheduler, STEPS)
        program = tfmq_fx.quantize(model, configuration(row), batches, timesteps=steps.timesteps, progress=False)
        seconds = round(time.perf_counter() - began)
        tfmq_fx.save(program, file)
    program = tfmq_fx.load(file)
    errors = []
    with torch.no_grad():
        for sample, timestep, wanted in points[EVERY // 2 :: EVERY]:
            error = predicted(program.graph_module(sample, timestep.expand(IMAGES)), CHANNELS) - wanted
            errors.append(float(error.norm() / wanted.norm()))
    images, _ = walk(program.graph_module, scheduler)
    torch.save({"float": reference, "images": images}, WORK / f"{file_name(row)}.pt")
    found = psnr(images, reference)
    return {
        "row": row,
        "error": round(sum(errors) / len(errors), 4),
        "errors": [round(error, 4) for error in errors],
        "psnr": round(float(found.mean()), 2),
        "psnr_worst": round(float(found.min()), 2),
        "bytes": path_bytes(file),
        "seconds": seconds,
    }


def run(rows: list[str]) -> None:
    """Measure the rows that are missing."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    missing = [row for row in rows if row not in [cell["row"] for cell in kept["rows"]]]
    if not missing:
        return
    model, scheduler = load_emoji_model()
    batches = tfmq_fx.sample_trajectories(
        model, scheduler, steps=STEPS, samples=CALIBRATED, batch_size=CALIBRATED, keep=KEPT, seed=0, progress=False
    )
    (WORK / "programs").mkdir(parents=True, exist_ok=True)
    for row in track(missing, "measuring"):
        kept["rows"].append(measure(row, model, scheduler, batches))
        kept.update(
            float_bytes=4 * sum(p.numel() for p in model.parameters()), images=IMAGES, steps=STEPS,
            threads=torch.get_num_threads(), torch=torch.__version__,
        )  # fmt: skip
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def report() -> None:
    """Print the table, and draw the images of the rows whose images are there, the float ones on top."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    print(f"float: {kept['float_bytes'] / 1e6:.2f} MB")
    print("| | error | PSNR, dB | worst | file, MB | seconds |\n|---|---|---|---|---|---|")
    for cell in sorted(kept["rows"], key=lambda cell: list(ROWS).index(cell["row"])):
        numbers = f"{cell['error']:.3f} | {cell['psnr']:.1f} | {cell['psnr_worst']:.1f} | {cell['bytes'] / 1e6:.2f}"
        print(f"| {cell['row']} | {numbers} | {cell['seconds']} |")
    files = {row: WORK / f"{file_name(row)}.pt" for row in ROWS}
    shown = {row: torch.load(file) for row, file in files.items() if file.is_file()}
    if shown:
        draw({"float": next(iter(shown.values()))["float"], **{row: found["images"] for row, found in shown.items()}})


def draw(rows: dict[str, Tensor]) -> None:
    """Each row's images side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(10, 0.85 * len(rows)), layout="constrained")
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(torch.cat([*images], 2).permute(1, 2, 0) / 2 + 0.5)
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.set_axis_off()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=160)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    if options.command == "run":
        if not EMOJI_MODEL.is_dir():
            print(f"the emoji model is not at {EMOJI_MODEL}: nothing was measured")
            return
        run(options.rows)
    else:
        report()


if __name__ == "__main__":
    main()
