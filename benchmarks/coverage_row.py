"""One row of the coverage matrix: capture, find, quantize, lower, compare."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architectures import ARCHITECTURES, TRUE_SIZE, Example
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import tfmq_fx
from tfmq_fx.errors import TfmqError
from tfmq_fx.passes.analysis import data_dependence, find_conditional_part

__all__ = ["measure", "measure_true_size"]

#: What class labels are called.
CLASSES = ("class_labels", "y")


def draw_zeros(model: torch.nn.Module) -> None:
    """Give parameters that start at zero small values: behind a zero layer every error is zero, or 0 / 0."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)


def batches(example: Example, count: int = 8) -> list[dict[str, Any]]:
    """Calibration batches along the schedule: other noise, other timesteps, the same conditions."""
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(100 + index)

        def drawn(leaf: Any, generator: torch.Generator = generator) -> Any:
            noisy = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 2
            return torch.randn(leaf.shape, generator=generator) if noisy else leaf

        inputs = pytree.tree_map(drawn, dict(example.inputs))
        if example.timestep in inputs:
            wanted = example.inputs[example.timestep]
            picked = torch.randint(len(example.timesteps), wanted.shape, generator=generator)
            inputs[example.timestep] = example.timesteps[picked].to(wanted.dtype)
        made.append(inputs)
    return made


def first_tensor(outputs: Any) -> Tensor:
    """The first tensor of a model's result."""
    return next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def relative_error(ours: Any, theirs: Tensor) -> float:
    """Root of the squared error over that of the original."""
    a, b = first_tensor(ours).detach().double(), theirs.double()
    return float((a - b).norm() / b.norm())


def find(captured: fx.GraphModule, example: Example) -> dict[str, Any]:
    """What the analysis sees: the block by the timestep alone, and with class labels beside it."""
    block = tfmq_fx.find_temporal_block(captured, example.timestep)
    classes = tuple(name for name in CLASSES if name in example.inputs)
    whole = tfmq_fx.find_temporal_block(captured, example.timestep, finite=classes) if classes else block
    return {
        "h": len(block.time_embedding),
        "g": len(block.embedding_layers),
        "frontier": len(block.features),
        "reason": block.reason,
        "g_with_classes": len(whole.embedding_layers) if classes else None,
        **conditional_part(captured, example),
    }


def conditional_part(captured: fx.GraphModule, example: Example) -> dict[str, Any]:
    """The layers that depend on the timestep and on conditions, but never on the sample (the first input)."""
    part = find_conditional_part(captured, {next(iter(example.inputs))}, example.timestep)
    dependence = data_dependence(captured)
    conditions = set().union(*(dependence[layer] for layer in part.joint)) - {example.timestep}
    return {"conditional_layers": len(part.joint), "conditions": sorted(conditions)}


def quantized(captured: fx.GraphModule, example: Example, weight_bits: int, temporal: str) -> Any:
    """Prepare, calibrate, convert."""
    config = tfmq_fx.QuantizationConfig(weight_bits=weight_bits, temporal=temporal)
    prepared = tfmq_fx.prepare(captured, config, timesteps=example.timesteps, timestep=example.timestep)
    tfmq_fx.calibrate(prepared, batches(example), progress=False)
    return tfmq_fx.convert(prepared)


def processor_time() -> float:
    """Seconds of the processor that this process and its children, compilers for one, have taken."""
    return sum(os.times()[:4])


@contextmanager
def stage(row: dict[str, Any], name: str) -> Iterator[None]:
    """Note how long a stage takes, also in time of the processor, and the peak of memory up to its end."""
    began, worked = time.perf_counter(), processor_time()
    yield
    row.setdefault("stages", {})[name] = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": processor_time() - worked,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def close(row: dict[str, Any]) -> dict[str, Any]:
    """Sum the stages up."""
    stages = row.get("stages", {}).values()
    for unit in ("seconds", "cpu_seconds"):
        row[unit] = sum(stage[unit] for stage in stages)
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


@torch.no_grad()
def run(program: Any, example: Example) -> Any:
    """What a quantized program makes of the example."""
    return program.graph_module(**example.inputs)


def measure(name: str, backend: str) -> dict[str, Any]:
    """One row: W4A8 and W8A8, the latter lowered."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"name": name, "backend": backend}
    try:
        example = ARCHITECTURES[name]()
    except ModuleNotFoundError as error:
        return {**row, "refused": f"not installed here: {error.name}"}
    draw_zeros(example.model)
    row["parameters"] = sum(parameter.numel() for parameter in example.model.parameters())
    with torch.no_grad():
        original = first_tensor(example.model(**example.inputs))
    try:
        with stage(row, "capture"):
            captured = tfmq_fx.capture(
                example.model, example_kwargs=example.inputs, dynamic_batch=example.dynamic_batch
            )
        row["captured"] = captured.meta["tfmq_fx.interface"].route
        row["block"] = find(captured, example)
        # What the refusal of a model without a time path tells the user to do.
        no_time_path = row["block"]["reason"] and not row["block"]["conditional_layers"]
        temporal = "float" if no_time_path else "fsc"
        for bits in (4, 8):
            with stage(row, f"quantize to W{bits}A8"):
                program = quantized(captured, example, bits, temporal)
            row[f"W{bits}A8"] = relative_error(run(program, example), original)
        with stage(row, "lower"):
            denoiser = tfmq_fx.lower(program, backend)
        row["lowered"] = relative_error(denoiser(**example.inputs), original)
        report = denoiser.report
        row.update(
            eligible=report.eligible,
            integer=report.integer_kernels,
            temporal_layers=report.temporal_layers,
            table_rows=report.table_rows,
            float_because=dict(Counter(entry.reason for entry in report.entries if entry.reason)),
            float_layers=[[entry.name, entry.operator, entry.reason] for entry in report.entries if entry.reason],
        )
    except TfmqError as error:
        row["refused"] = str(error)
    return close(row)


def measure_true_size(name: str) -> dict[str, Any]:
    """One model of its true size: capture, prepare, one calibration batch, convert, with the memory of each stage.

    What a stage leaves behind is dropped before the next one, as a script that is short of memory would do it.
    """
    torch.manual_seed(0)
    row: dict[str, Any] = {"name": name, "backend": "none"}
    with stage(row, "build"):
        example = TRUE_SIZE[name]()
        draw_zeros(example.model)
    row["parameters"] = sum(parameter.numel() for parameter in example.model.parameters())
    with torch.no_grad():
        original = first_tensor(example.model(**example.inputs))
    with stage(row, "capture"):
        captured = tfmq_fx.capture(example.model, example_kwargs=example.inputs, dynamic_batch=example.dynamic_batch)
    row["captured"], row["block"] = captured.meta["tfmq_fx.interface"].route, find(captured, example)
    inputs, timesteps, calibration = example.inputs, example.timesteps, batches(example, 1)
    del example
    with stage(row, "prepare"):
        prepared = tfmq_fx.prepare(captured, tfmq_fx.QuantizationConfig(weight_bits=8), timesteps=timesteps)
        del captured
        gc.collect()
    with stage(row, "calibrate"):
        tfmq_fx.calibrate(prepared, calibration, progress=False)
    with stage(row, "convert"):
        program = tfmq_fx.convert(prepared)
    del prepared
    with stage(row, "run"), torch.no_grad():
        row["W8A8"] = relative_error(program.graph_module(**inputs), original)
    return close(row)
