"""Reconstruct: the temporal block first, then unit by unit in the order of the graph."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import fx, nn

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ConfigError, ReconstructionError
from tfmq_fx.fake_quantizers import insert_fake_quantizers
from tfmq_fx.frontend.batches import Batch, as_batches
from tfmq_fx.frontend.notes import keep_notes, restore_notes
from tfmq_fx.frontend.program_stage import CONVERTED, describe, stage_of
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.reconstruction.checkpoint import Checkpoint
from tfmq_fx.reconstruction.fingerprints import run_fingerprints
from tfmq_fx.reconstruction.once import OnceEach
from tfmq_fx.reconstruction.progress import ReconstructionProgress
from tfmq_fx.reconstruction.report import ReconstructionReport
from tfmq_fx.reconstruction.run import ReconstructionRun
from tfmq_fx.reconstruction.samples import gather_samples
from tfmq_fx.reconstruction.store import ActivationStore

__all__ = ["reconstruct"]

#: Memory for cached activations unless the caller says otherwise.
CACHE_BYTES = 2 * 2**30


@pipeline_stage
def reconstruct(
    prepared: fx.GraphModule,
    batches: Iterable[Batch] = (),
    config: ReconstructionConfig | Mapping[str, Any] | str | None = None,
    *,
    directory: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = True,
) -> ReconstructionReport:
    """Choose how weights are rounded, in place: TIAR for the temporal block, then BRECQ unit by unit; or GPTQ.

    Layers that depend on the timestep and the conditioning alone are the second unit: they learn from their own output
    too, over all timesteps, under the conditionings of the batches.

    Each unit's inputs come from the quantized units before it, its targets from the float model; the
    temporal block learns from its own output over all timesteps, without any data, and is frozen then.
    With ``method="gptq"`` nothing is trained: every layer is a unit, those of the temporal block over all timesteps.
    A unit whose error on held-back samples does not fall stays rounded to nearest.

    Args:
        prepared: The calibrated result of :func:`tfmq_fx.prepare`; its observers become fake quantizers.
        batches: The model's own inputs, those that it was calibrated on; not needed for
            ``granularity="none"`` with ``temporal_objective="features"``, but for the conditional part, if there is
            one.
        config: How to reconstruct: a configuration, its fields, or a name, as in
            ``QuantizationConfig.reconstruction``; by default what the quantization configuration says, GPTQ where
            that is its default, else the paper's method. Without this call weights are rounded to nearest.
        directory: Where the state of finished units lies. The same call with the same directory goes on
            where an interrupted one stopped and ends with the same bits. None keeps nothing.
        cache_bytes: Memory for cached activations; what is beyond lies in files in ``directory`` (or the
            system's temporary folder), which vanish with the process.
        progress: Whether to draw a progress bar with loss, time left and memory, where stderr is a terminal;
            ``TFMQ_FX_PROGRESS=0`` turns all off.

    Returns:
        What became of each unit.

    Raises:
        CalibrationError: The graph was not calibrated, or the batches do not fit it.
        NonFiniteError: A unit gives NaN or infinite values; the error names it, the batch and the timesteps.
        ConfigError: The graph was not prepared with our quantizer, the timesteps are missing, or the batches that
            ``temporal_objective="prediction"`` asks for.
        ReconstructionError: The directory belongs to another run, or there is no room for activations.

    Source: TFMQ-DM (CVPR 2024), section 5; BRECQ (ICLR 2021); AdaRound (ICML 2020); GPTQ (ICLR 2023).
    """
    stage = stage_of(prepared) if isinstance(prepared, fx.GraphModule) else ""
    state = PreparedState.find(prepared) if stage and stage != CONVERTED else None
    if state is None:
        msg = f"reconstruct needs a graph that was prepared with TFMQQuantizer and calibrated, not {describe(prepared)}"
        raise ConfigError(msg)
    restore_notes(prepared)
    config = _chosen(config, state)
    batches = list(as_batches(batches))
    if config.temporal_objective == "prediction" and not batches:
        msg = "temporal_objective='prediction' looks at what the model makes of the batches: pass them to reconstruct"
        raise ConfigError(msg)
    if directory is not None and not isinstance(directory, (str, Path)):
        msg = f"directory= is a {type(directory).__name__}: pass the folder for the state as a string or pathlib.Path"
        raise ReconstructionError(msg)
    folder = None if directory is None else Path(directory)
    began = time.perf_counter()
    insert_fake_quantizers(prepared)
    with _frozen(prepared):
        run = ReconstructionRun(prepared, state, config, batches)
        needed = config.granularity != "none" or run.for_prediction is not None
        samples = gather_samples(prepared, batches, config.seed) if needed else None
        checkpoint = Checkpoint(folder, run_fingerprints(run, samples))
        store = ActivationStore(cache_bytes, folder)
        with ReconstructionProgress(run.iterations(), enabled=progress) as bar:
            once = OnceEach(checkpoint, bar)
            units = run.go(samples, store, once)
    # Notes of its own: copies of the graph, which were not reconstructed, share the old ones.
    keep_notes(prepared)
    dataclasses.replace(state, config=dataclasses.replace(state.config, reconstruction=config)).attach(prepared)
    return ReconstructionReport(
        units=tuple(units),
        seconds=time.perf_counter() - began + once.earlier_seconds,
        peak_cache_bytes=store.peak,
        spilled_bytes=store.peak_in_files,
        resumed=once.resumed,
    )


def _chosen(
    config: ReconstructionConfig | Mapping[str, Any] | str | None, state: PreparedState
) -> ReconstructionConfig:
    """How to reconstruct: as asked for, else as configured, else as in the paper."""
    configured = state.config.reconstruction or state.config.resolved_reconstruction
    chosen = ReconstructionConfig.of(config) or configured or ReconstructionConfig()
    if chosen.method == "nearest":
        msg = f"reconstruction={chosen.method!r} asks for none: leave the call of reconstruct out"
        raise ConfigError(msg)
    return chosen


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter collects gradients for the time of a block: only soft weights and step sizes do."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
