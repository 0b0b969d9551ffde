"""One diagnosis under way: its sections, measured one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.diagnostics.comparison import ddim_scheduler
from tfmq_fx.diagnostics.features import temporal_feature_error, temporal_features
from tfmq_fx.diagnostics.graph_runs import graph_denoiser, sample_input, with_temporal_features
from tfmq_fx.diagnostics.layer_error import Flavour, layer_errors
from tfmq_fx.diagnostics.mismatch import find_mismatch
from tfmq_fx.diagnostics.trajectory import Trajectory, record_trajectory, trajectory_deviation
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.batches import Batch
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.timestep_values import as_captured
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["DiagnosisRun", "Progress"]

#: Steps of the float trajectory whose states the layers are measured on when no batch is given.
LAYER_STEPS = 5
#: Sampling steps for a program without a table.
DEFAULT_STEPS = 50

#: Called with the name of a section, the units of work done in it, and how many it has.
Progress = Callable[[str, int, int], None]


@dataclass
class DiagnosisRun:
    """One diagnosis under way: its arguments, and what was measured so far."""

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
    sections: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    float_trajectory: Trajectory | None = None

    def __post_init__(self) -> None:
        """Fill in what the program knows."""
        self.timestep = self.program.timestep
        self.scheduler = self.scheduler if self.scheduler is not None else self.program.scheduler or None
        table = self.program.timesteps
        default = DEFAULT_STEPS if table is None else len(table)
        self.step_count = default if self.steps is None else self.steps

    def report_progress(self, section: str, done: int, total: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(section, done, total)

    def skip(self, reason: str, *sections: str) -> None:
        """Leave sections out."""
        self.skipped.update(dict.fromkeys(sections, reason))

    def missing_block_reason(self) -> str:
        """Why there are no temporal features to compare, or ``""``."""
        for name, graph_module in (("the model", self.captured), ("the program", self.program.graph_module)):
            block = find_temporal_block(graph_module, self.timestep, finite=tuple(self.program.finite))
            if not block:
                return f"{name} has no temporal block: {block.reason}"
        return ""

    def measure_temporal_features(self) -> None:
        """Compare the temporal features."""
        values: Any = self.timesteps if self.timesteps is not None else self.program.timesteps
        if values is None and self.scheduler is not None:
            values = ddim_scheduler(self.scheduler, self.step_count).timesteps
        reason = self.missing_block_reason()
        if not reason and values is None:
            reason = "the program has no table of timesteps; pass timesteps or a scheduler"
        if reason:
            return self.skip(reason, "features", "mismatch", "nearest")
        self.report_progress("temporal features", 0, 3)
        quantized = temporal_features(self.program, values)
        fixed = {name: float(allowed[0]) for name, allowed in self.program.finite.items()}
        features = temporal_features(self.captured, quantized.timesteps, timestep=self.timestep, fixed=fixed)
        self.sections["features"] = temporal_feature_error(features, quantized)
        self.report_progress("temporal features", 1, 3)
        if len(quantized.timesteps) < 2:
            self.skip("a mismatch needs at least two timesteps to choose from", "mismatch", "nearest")
        else:
            self.sections["mismatch"] = find_mismatch(features, quantized, "cosine")
            self.report_progress("temporal features", 2, 3)
            self.sections["nearest"] = find_mismatch(features, quantized, "distance")
        self.report_progress("temporal features", 3, 3)
        return None

    def initial_noise(self) -> Tensor:
        """The noise to start from."""
        if self.noise is not None:
            return self.noise
        name = sample_input(self.captured, self.timestep)
        node = next(n for n in self.captured.graph.nodes if n.op == "placeholder" and n.target == name)
        shape = [self.samples, *(int(size) for size in node_value(node).shape[1:])]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return noise.to(next((p.device for p in self.captured.parameters()), noise.device))

    def measure_trajectories(self) -> None:
        """Sample with the float model, the program, and the float model with the program's temporal features."""
        names = ("trajectory", "temporal_trajectory")
        if self.scheduler is None:
            return self.skip("the program does not name its noise schedule; pass scheduler", *names)
        timesteps = ddim_scheduler(self.scheduler, self.step_count).timesteps
        limit = self.program.interface.max_batch
        options: dict[str, Any] = {"timestep": self.timestep, "extra": self.extra, "max_batch": limit}
        try:
            # The program first: it may refuse the timesteps.
            denoisers = {"quantized": graph_denoiser(self.program.graph_module, **options)}
            denoisers["float"] = graph_denoiser(self.captured, **options)
        except ConfigError as error:
            return self.skip(str(error), *names)
        if reason := self.missing_block_reason():
            self.skip(reason, "temporal_trajectory")
        else:
            features = temporal_features(self.program, timesteps)
            denoisers["temporal block"] = with_temporal_features(self.captured, features, **options)
        noise = self.initial_noise()
        trajectories = {name: self.record(name, run, self.scheduler, noise) for name, run in denoisers.items()}
        self.float_trajectory = trajectories["float"]
        for section, name in zip(names, ("quantized", "temporal block"), strict=True):
            if name in trajectories:
                self.sections[section] = trajectory_deviation(trajectories["float"], trajectories[name])
        return None

    def record(
        self, name: str, denoiser: Callable[..., Any], scheduler: Scheduler | Mapping[str, Any], noise: Tensor
    ) -> Trajectory:
        """Record one trajectory with progress."""
        total, done = self.step_count, 0

        def step() -> None:
            nonlocal done
            done += 1
            self.report_progress(f"sampling, {name}", done, total)

        self.report_progress(f"sampling, {name}", 0, total)
        return record_trajectory(denoiser, scheduler, steps=total, noise=noise, on_step=step)

    def measure_layers(self) -> None:
        """Compare the outputs of the weighted layers."""
        batches = self.layer_batches()
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
                self.report_progress(text, done, len(batches))

            self.report_progress(text, 0, len(batches))
            self.sections[section] = layer_errors(
                self.captured,
                self.program,
                batches,
                flavour=flavour,
                on_batch=step,
            )
        return None

    def layer_batches(self) -> list[Batch]:
        """The batches given, or states of the float trajectory."""
        if self.batch is not None:
            return list(self.batch) if isinstance(self.batch, list) else [self.batch]
        if self.float_trajectory is None:
            return []
        timesteps, states = self.float_trajectory.timesteps, self.float_trajectory.states
        steps = torch.linspace(0, len(timesteps) - 1, min(LAYER_STEPS, len(timesteps))).round().long()
        batch_size = self.program.interface.max_batch or states.shape[1]
        return [self.inputs_at(states[step][:batch_size], timesteps[step]) for step in steps.tolist()]

    def inputs_at(self, x: Tensor, t: Tensor) -> dict[str, Any]:
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
