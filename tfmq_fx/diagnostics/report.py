"""``diagnose``: measure everything that this package knows about one quantized program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.diagnostics.comparison import ddim_scheduler
from tfmq_fx.diagnostics.diagnosis import Diagnosis
from tfmq_fx.diagnostics.features import (
    temporal_feature_error,
    temporal_features,
)
from tfmq_fx.diagnostics.graph_runs import graph_denoiser, sample_input, with_temporal_features
from tfmq_fx.diagnostics.layer_error import Flavour, layer_errors
from tfmq_fx.diagnostics.mismatch import find_mismatch
from tfmq_fx.diagnostics.same_model import check_same_model
from tfmq_fx.diagnostics.trajectory import Trajectory, record_trajectory, trajectory_deviation
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.batches import Batch
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.timestep_values import as_captured
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["diagnose"]

#: Steps of the float trajectory whose states the layers are measured on when no batch is given.
LAYER_STEPS = 5
#: Sampling steps for a program without a table.
DEFAULT_STEPS = 50

#: Called with the name of a section, the units of work done in it, and how many it has.
Progress = Callable[[str, int, int], None]


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
    run = _Run(captured, program, batch, scheduler, samples, steps, timesteps, noise, extra, seed, progress)
    run.temporal()
    run.trajectories()
    run.layers()
    return Diagnosis(label, program.config.to_dict(), **run.found, skipped=run.skipped)


@dataclass
class _Run:
    """One diagnosis under way: its arguments, and what was found so far."""

    captured: fx.GraphModule
    program: QuantizedProgram
    batch: Batch | list[Batch] | None
    scheduler: Scheduler | Mapping[str, Any] | None
    samples: int
    steps: int | None
    timesteps: Tensor | Iterable[float] | None
    noise: Tensor | None
    extra: Mapping[str, Any] | None
    seed: int
    progress: Progress | None
    found: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    float_trajectory: Trajectory | None = None

    def __post_init__(self) -> None:
        """Fill in what the program knows."""
        self.timestep = self.program.timestep
        self.scheduler = self.scheduler if self.scheduler is not None else self.program.scheduler or None
        table = self.program.timesteps
        default = DEFAULT_STEPS if table is None else len(table)
        self.count = default if self.steps is None else self.steps

    def say(self, section: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(section, done, total)

    def skip(self, reason: str, *sections: str) -> None:
        """Leave sections out."""
        self.skipped.update(dict.fromkeys(sections, reason))

    def missing_block(self) -> str:
        """Why there are no temporal features to compare, or ``""``."""
        for name, graph_module in (("the model", self.captured), ("the program", self.program.graph_module)):
            block = find_temporal_block(graph_module, self.timestep, finite=tuple(self.program.finite))
            if not block:
                return f"{name} has no temporal block: {block.reason}"
        return ""

    def temporal(self) -> None:
        """Compare the temporal features."""
        values: Any = self.timesteps if self.timesteps is not None else self.program.timesteps
        if values is None and self.scheduler is not None:
            values = ddim_scheduler(self.scheduler, self.count).timesteps
        reason = self.missing_block()
        if not reason and values is None:
            reason = "the program has no table of timesteps; pass timesteps or a scheduler"
        if reason:
            return self.skip(reason, "features", "mismatch", "nearest")
        self.say("temporal features", 0, 3)
        quantized = temporal_features(self.program, values)
        fixed = {name: float(allowed[0]) for name, allowed in self.program.finite.items()}
        features = temporal_features(self.captured, quantized.timesteps, timestep=self.timestep, fixed=fixed)
        self.found["features"] = temporal_feature_error(features, quantized)
        self.say("temporal features", 1, 3)
        if len(quantized.timesteps) < 2:
            self.skip("a mismatch needs at least two timesteps to choose from", "mismatch", "nearest")
        else:
            self.found["mismatch"] = find_mismatch(features, quantized, "cosine")
            self.say("temporal features", 2, 3)
            self.found["nearest"] = find_mismatch(features, quantized, "distance")
        self.say("temporal features", 3, 3)
        return None

    def start(self) -> Tensor:
        """The noise to start from."""
        if self.noise is not None:
            return self.noise
        name = sample_input(self.captured, self.timestep)
        node = next(n for n in self.captured.graph.nodes if n.op == "placeholder" and n.target == name)
        shape = [self.samples, *(int(size) for size in node_value(node).shape[1:])]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return noise.to(next((p.device for p in self.captured.parameters()), noise.device))

    def trajectories(self) -> None:
        """Sample with the float model, the program, and the float model with the program's temporal features."""
        sections = ("trajectory", "temporal_trajectory")
        if self.scheduler is None:
            return self.skip("the program does not name its noise schedule; pass scheduler", *sections)
        timesteps = ddim_scheduler(self.scheduler, self.count).timesteps
        limit = self.program.interface.max_batch
        options: dict[str, Any] = {"timestep": self.timestep, "extra": self.extra, "max_batch": limit}
        try:
            # The program first: it may refuse the timesteps.
            denoisers = {"quantized": graph_denoiser(self.program.graph_module, **options)}
            denoisers["float"] = graph_denoiser(self.captured, **options)
        except ConfigError as error:
            return self.skip(str(error), *sections)
        if reason := self.missing_block():
            self.skip(reason, "temporal_trajectory")
        else:
            features = temporal_features(self.program, timesteps)
            denoisers["temporal block"] = with_temporal_features(self.captured, features, **options)
        noise = self.start()
        walked = {name: self.walk(name, denoiser, self.scheduler, noise) for name, denoiser in denoisers.items()}
        self.float_trajectory = walked["float"]
        for section, name in zip(sections, ("quantized", "temporal block"), strict=True):
            if name in walked:
                self.found[section] = trajectory_deviation(walked["float"], walked[name])
        return None

    def walk(
        self, name: str, denoiser: Callable[..., Any], scheduler: Scheduler | Mapping[str, Any], noise: Tensor
    ) -> Trajectory:
        """Record one trajectory with progress."""
        total, done = self.count, 0

        def step() -> None:
            nonlocal done
            done += 1
            self.say(f"sampling, {name}", done, total)

        self.say(f"sampling, {name}", 0, total)
        return record_trajectory(denoiser, scheduler, steps=total, noise=noise, on_step=step)

    def layers(self) -> None:
        """Compare the outputs of the weighted layers."""
        batches = self.batches()
        if not batches:
            reason = "there is no batch to measure the layers on; pass batch or a scheduler"
            return self.skip(reason, "layers", "local_layers")
        flavours: tuple[tuple[str, Flavour, str], ...] = (
            ("layers", "accumulated", "layers, as the net runs"),
            ("local_layers", "local", "layers, each alone"),
        )
        for section, flavour, text in flavours:
            done = 0

            def step(text: str = text) -> None:
                nonlocal done
                done += 1
                self.say(text, done, len(batches))

            self.say(text, 0, len(batches))
            self.found[section] = layer_errors(
                self.captured,
                self.program,
                batches,
                flavour=flavour,
                on_batch=step,
            )
        return None

    def batches(self) -> list[Batch]:
        """The batches given, or states of the float trajectory."""
        if self.batch is not None:
            return list(self.batch) if isinstance(self.batch, list) else [self.batch]
        if self.float_trajectory is None:
            return []
        timesteps, states = self.float_trajectory.timesteps, self.float_trajectory.states
        picked = torch.linspace(0, len(timesteps) - 1, min(LAYER_STEPS, len(timesteps))).round().long()
        rows = self.program.interface.max_batch or states.shape[1]
        return [self.state(states[step][:rows], timesteps[step]) for step in picked.tolist()]

    def state(self, x: Tensor, t: Tensor) -> dict[str, Any]:
        """One state of a trajectory as inputs by name."""
        node = next(n for n in self.captured.graph.nodes if n.op == "placeholder" and n.target == self.timestep)
        like: Tensor = node_value(node)
        t = as_captured(t, like.dtype, self.timestep)
        inputs = {
            name: value[: len(x)] if isinstance(value, Tensor) and value.ndim else value
            for name, value in (self.extra or {}).items()
        }
        inputs[sample_input(self.captured, self.timestep)] = x
        inputs[self.timestep] = t.expand(len(x)) if like.ndim else t
        return {name: inputs[name] for name in calling_convention(self.captured.graph)[0]}
