"""``diagnose``: measure everything that this package knows about one quantized program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.diagnostics.diagnosis import Diagnosis
from tfmq_fx.diagnostics.diagnosis_run import DiagnosisRun, Progress
from tfmq_fx.diagnostics.same_model import check_same_model
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.batches import Batch
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["diagnose"]


@in_plain_surroundings
def diagnose(
    captured: fx.GraphModule,
    program: QuantizedProgram,
    *,
    label: str = "quantized",
    batch: Batch | list[Batch] | None = None,
    scheduler: Scheduler | Mapping[str, Any] | None = None,
    samples: int = 8,
    steps: int | None = None,
    timesteps: Tensor | Iterable[float] | None = None,
    noise: Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure what a quantized program lost against its float model, and where.

    Args:
        captured: The float graph (:func:`tfmq_fx.capture`) that the program was made from. Not changed.
        program: The quantized program, its temporal block still in the graph. Not changed.
        label: The program's name in tables and pictures.
        batch: What the layers are measured on: one batch of the model's own inputs (a tuple, a mapping, a
            tensor) or a list of batches, at timesteps that the program serves. By default states of the
            float trajectory at five of its steps.
        scheduler: A diffusers scheduler or its configuration; by default the one that the program names.
        samples: Trajectories.
        steps: Sampling steps (deterministic DDIM); by default as many as the program's table has rows, or 50.
        timesteps: Where the temporal features are compared, and the timesteps a feature may be mistaken for.
            By default those of the program's table; ``range(1000)`` for a whole training schedule.
        noise: The noise to start from, ``[N, C, ...]``; by default drawn with ``seed`` in the captured shape.
        extra: Further inputs of the model by name, as for :func:`graph_denoiser`.
        seed: Seed of the noise.
        progress: Called as ``progress(section, done, total)``.

    Returns:
        The diagnosis. What cannot be measured, such as the temporal features of a model without a temporal
        block, is left out with a reason in ``skipped``.

    Raises:
        ConfigError: The program was made from another model, or an argument is not usable.
        TimestepError: The program does not serve a timestep of the batch, or of the sampling steps.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        msg = f"samples={samples!r} must be a whole number of at least 1"
        raise ConfigError(msg)
    check_same_model(captured, program, label)
    run = DiagnosisRun(captured, program, batch, scheduler, samples, steps, timesteps, noise, extra, seed, progress)
    run.measure_temporal_features()
    run.measure_trajectories()
    run.measure_layers()
    return Diagnosis(label, program.config.to_dict(), **run.sections, skipped=run.skipped)
