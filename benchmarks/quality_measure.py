"""Measure one cell of the quality benchmark: quantize, save the program, compare it with the float model."""

from __future__ import annotations

import argparse
import platform
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from quality_cells import WORK, cell_name, kept, write_json
from quality_features import cached_rows, compare_features, mismatch_entry
from quality_methods import CACHED, configuration
from quality_models import MODELS, QualityModel
from torch import fx

import tfmq_fx
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.diagnostics import (
    find_mismatch,
    graph_denoiser,
    temporal_features,
    trajectory_deviation,
    with_temporal_features,
)
from tfmq_fx.diagnostics.comparison import path_bytes

__all__ = ["measure_cell"]


def measure_cell(model_name: str, method: str, bits: str, seed: int, options: argparse.Namespace) -> None:
    """Quantize, save the program, and compare it with the float model."""
    name, work, quality_model = cell_name(method, bits, seed), WORK / model_name, MODELS[model_name]
    model, scheduler = quality_model.load()
    sampler = quality_model.sampler(scheduler)
    batches = kept(work / "calibration" / f"s{seed}.pt", lambda: quality_model.calibration(model, sampler, seed))
    captured = tfmq_fx.capture(model, example_kwargs=batches[0])
    config = configuration(method, bits, seed, options.iterations, options.temporal_iterations)

    wall, cpu = time.perf_counter(), time.process_time()
    prepared = tfmq_fx.prepare(captured, config, timesteps=sampler.timesteps)
    tfmq_fx.calibrate(prepared, batches, progress=False)
    report = None
    if config.resolved_reconstruction is not None:
        report = tfmq_fx.reconstruct(prepared, batches, directory=work / "state" / name, progress=False)
    program = tfmq_fx.convert(prepared)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    program.scheduler = {key: value for key, value in sampler.config.items() if not key.startswith("_")}
    path = tfmq_fx.save(program, work / "programs" / name)
    about = {
        "config": program.config.to_dict(),
        "seconds": seconds,
        "peak_bytes": peak,
        "artefact_bytes": path_bytes(path),
        "units": None if report is None else report.to_dict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    float_features = temporal_features(captured, sampler.timesteps)
    rows = {method: temporal_features(program, sampler.timesteps)}
    if method in CACHED:
        rows[CACHED[method]] = cached_rows(float_features)
    comparison = TrajectoryComparison(quality_model, captured, sampler, work, seed, options.samples)
    for label, features in rows.items():
        full = None
        if label == method and quality_model.every is not None:
            pair = (temporal_features(source, quality_model.every) for source in (captured, program))
            full = mismatch_entry(find_mismatch(*pair, "cosine"))
        cell = {
            "model": model_name,
            "method": label,
            "bits": bits,
            "seed": seed,
            "samples": options.samples,
            **compare_features(float_features, features),
            "mismatch_every_timestep": full,
            **comparison.of(program, float_features, features),
            **about,
        }
        write_json(work / "cells" / f"{cell_name(label, bits, seed)}.json", cell)


class TrajectoryComparison:
    """PSNR and deviation from the float trajectories: the whole program, and its temporal features alone."""

    def __init__(
        self, model: QualityModel, captured: fx.GraphModule, sampler: Scheduler, work: Path, seed: int, samples: int
    ) -> None:
        self.model, self.captured, self.sampler = model, captured, sampler
        self.extra, self.noise = model.extra(samples), model.noise(samples, seed)
        denoiser = graph_denoiser(captured, extra=self.extra)
        self.original = kept(
            work / "float-trajectories" / f"s{seed}-{samples}.pt",
            lambda: model.trajectory(denoiser, sampler, self.noise),
        )

    def of(self, program: tfmq_fx.QuantizedProgram, float_features: Any, features: Any) -> dict[str, Any]:
        """Of a program with ``features`` in the place of its own."""
        whole = self._deviation(program.graph_module, features)
        alone = None
        if not torch.equal(torch.cat(features.values, 1), torch.cat(float_features.values, 1)):
            alone = self._deviation(self.captured, features)
        return {
            "psnr": whole.psnr.tolist(),
            "psnr_time_only": None if alone is None else alone.psnr.tolist(),
            "deviation": whole.mean.tolist(),
            "deviation_time_only": None if alone is None else alone.mean.tolist(),
        }

    def _deviation(self, graph: fx.GraphModule, features: Any) -> Any:
        denoiser = with_temporal_features(graph, features, extra=self.extra)
        return trajectory_deviation(self.original, self.model.trajectory(denoiser, self.sampler, self.noise))
