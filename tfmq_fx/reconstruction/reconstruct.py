"""Reconstruct: the temporal block first, then unit by unit in the order of the graph."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ConfigError, ReconstructionError
from tfmq_fx.fake_quantizers import ActivationQuantizer, AdaRoundQuantizer, insert_fake_quantizers, quantizers_of
from tfmq_fx.frontend.batches import Batch, bind_batch
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.notes import noted
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.passes import PartitionUnits
from tfmq_fx.passes.analysis import find_temporal_block, find_units, row_columns
from tfmq_fx.passes.analysis.reconstruction_units import EARLY
from tfmq_fx.passes.temporal.index_timesteps import distinct_timesteps
from tfmq_fx.quantization.annotate import META_KEY
from tfmq_fx.quantization.stage_checks import CONVERTED, describe, stage_of
from tfmq_fx.reconstruction.checkpoint import Checkpoint, fingerprint
from tfmq_fx.reconstruction.code_digest import code_digest
from tfmq_fx.reconstruction.conditional import (
    ConditionalUnit,
    observe_conditional_part,
    reconstruct_conditional_part,
)
from tfmq_fx.reconstruction.finite_targets import require_finite_targets
from tfmq_fx.reconstruction.fisher import fisher_information
from tfmq_fx.reconstruction.progress import ReconstructionProgress
from tfmq_fx.reconstruction.propagation import Propagation
from tfmq_fx.reconstruction.report import ReconstructionReport, UnitResult
from tfmq_fx.reconstruction.samples import Samples, gather_samples
from tfmq_fx.reconstruction.store import ActivationStore
from tfmq_fx.reconstruction.temporal import (
    observe_temporal_block,
    reconstruct_temporal_block,
    sampled_rows,
    temporal_quantizers,
)
from tfmq_fx.reconstruction.training import WORTH_COMPILING
from tfmq_fx.reconstruction.unit import load_state, reconstruct_unit, state_of, trainable_weights
from tfmq_fx.temporal.conditional_calibration import conditioned_path, prepared_conditionings
from tfmq_fx.temporal.conditionings import ConditionedTimesteps

__all__ = ["reconstruct"]

log = logging.getLogger(__name__)

#: Memory for cached activations unless the caller says otherwise.
CACHE_BYTES = 2 * 2**30
#: Seeds of units are this far apart, so that no two share one whatever the seed of the run.
SEED_STRIDE = 1_000_003


@in_plain_surroundings
def reconstruct(
    prepared: fx.GraphModule,
    batches: Iterable[Batch] = (),
    config: ReconstructionConfig | None = None,
    *,
    directory: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = True,
) -> ReconstructionReport:
    """Learn how weights are rounded, in place: TIAR for the temporal block, then BRECQ unit by unit.

    Layers that depend on the timestep and the conditioning alone are the second unit: they learn from their own output
    too, over all timesteps, under the conditionings of the batches.

    Each unit's inputs come from the quantized units before it, its targets from the float model; the
    temporal block learns from its own output over all timesteps, without any data, and is frozen then.
    A unit whose error on held-back rows does not fall stays rounded to nearest.

    Args:
        prepared: The calibrated result of :func:`tfmq_fx.prepare`; its observers become fake quantizers.
        batches: The model's own inputs, those that it was calibrated on; not needed for
            ``granularity="none"``, but for the conditional part, if there is one.
        config: How to reconstruct; by default what the quantization configuration says, else the paper's
            method.
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
        ConfigError: The graph was not prepared with our quantizer, or the timesteps are missing.
        ReconstructionError: The directory belongs to another run, or there is no room for activations.

    Source: TFMQ-DM (CVPR 2024), section 5; BRECQ (ICLR 2021); AdaRound (ICML 2020).
    """
    stage = stage_of(prepared) if isinstance(prepared, fx.GraphModule) else ""
    about: dict[str, Any] | None = noted(prepared, META_KEY) if stage and stage != CONVERTED else None
    if about is None:
        msg = f"reconstruct needs a graph that was prepared with TFMQQuantizer and calibrated, not {describe(prepared)}"
        raise ConfigError(msg)
    config = config or QuantizationConfig.from_dict(about["config"]).reconstruction or ReconstructionConfig()
    began = time.perf_counter()
    insert_fake_quantizers(prepared)
    batches = list(batches)
    with _frozen(prepared):
        run = _Run(prepared, about, config, batches)
        samples = None if config.granularity == "none" else gather_samples(prepared, batches, config.seed)
        folder = None if directory is None else Path(directory)
        checkpoint = Checkpoint(folder, run.fingerprint(samples))
        store = ActivationStore(cache_bytes, folder)
        with ReconstructionProgress(run.iterations(), enabled=progress) as bar:
            units = run.go(samples, store, checkpoint, bar)
    about["config"]["reconstruction"] = dataclasses.asdict(config)
    return ReconstructionReport(
        units=tuple(units),
        seconds=time.perf_counter() - began + run.earlier_seconds,
        peak_cache_bytes=store.peak,
        spilled_bytes=store.peak_in_files,
        resumed=run.resumed,
    )


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


class _Run:
    """One reconstruction: the partitioned graph and what is counted on the way."""

    def __init__(
        self, prepared: fx.GraphModule, about: dict[str, Any], config: ReconstructionConfig, batches: list[Batch]
    ) -> None:
        self.prepared, self.about, self.config = prepared, about, config
        self.timestep: str = about["timestep"]
        values = None if about["timesteps"] is None else distinct_timesteps(about["timesteps"])
        self.inputs = row_columns(prepared) or ({} if values is None else {self.timestep: values})
        self.resumed, self.earlier_seconds = 0, 0.0
        block = find_temporal_block(prepared, self.timestep)
        inside = set(temporal_quantizers(prepared, block))
        self.temporal = {name for name, module in quantizers_of(prepared).items() if module in inside}
        self.learns = any(isinstance(prepared.get_submodule(name), AdaRoundQuantizer) for name in self.temporal)
        if self.learns and not self.inputs and config.temporal != "nearest":
            msg = "the temporal block is reconstructed over the schedule's timesteps: pass timesteps= to prepare"
            raise ConfigError(msg)
        self.tiar = self.learns and config.temporal == "tiar"
        self.path = conditioned_path(prepared, about)
        self.pairs = _pairs(prepared, about, batches)
        for quantizer in quantizers_of(prepared).values():
            if isinstance(quantizer, AdaRoundQuantizer):
                quantizer.round_to_nearest()
            elif isinstance(quantizer, ActivationQuantizer):
                quantizer.forget_step()
        self._observe()
        self.conditional = self._conditional_unit()
        # A copy of the graph alone: it shares every tensor and quantizer with the one that came in.
        self.graph_module = fx.GraphModule(prepared, copy.deepcopy(prepared.graph))
        PartitionUnits(
            timestep=self.timestep,
            granularity="layer" if config.granularity == "layer" else "block",
            temporal=config.temporal != "blocks",
            conditions=about.get("conditions", ()),
        )(self.graph_module)
        self.units = [node for node in self.graph_module.graph.nodes if "tfmq_fx.unit" in node.meta]

    def _observe(self) -> None:
        if self.temporal and self.inputs:
            observe_temporal_block(self.prepared, self.timestep, self.inputs)
        self._observe_conditional()

    def _observe_conditional(self) -> None:
        if self.pairs is not None:
            observe_conditional_part(self.prepared, self.path, self.pairs)

    def _conditional_unit(self) -> ConditionalUnit | None:
        """The part that learns over pairs; None without one, or without conditionings."""
        conditions = self.about.get("conditions", ())
        if not conditions or self.pairs is None or self.config.temporal != "tiar":
            return None
        units = find_units(self.prepared, self.timestep, conditions=conditions)
        found = next((unit for unit in units if unit.kind == "conditional"), None)
        part = None if found is None else ConditionalUnit(found, self.path, self.pairs)
        weights = {} if part is None else part.quantizers(self.prepared)
        return part if any(isinstance(module, AdaRoundQuantizer) for module in weights.values()) else None

    def _weights(self, node: fx.Node) -> list[AdaRoundQuantizer]:
        return trainable_weights(self.graph_module.get_submodule(str(node.target)))

    def _trains(self, node: fx.Node) -> bool:
        """Whether a unit's rounding is learned by its own output's error over calibration rows."""
        if self.config.granularity == "none" or node.meta["tfmq_fx.unit"][1] in EARLY:
            return False
        return bool(self._weights(node))

    def iterations(self) -> int:
        """Training steps of the whole run."""
        count = self.config.iterations * sum(self._trains(node) for node in self.units)
        return count + self.config.temporal_iterations * (self.tiar + (self.conditional is not None))

    def _updates_compiled(self) -> bool:
        """Whether the run has enough weights and iterations to compile their update."""
        updates = sum(quantizer.up.numel() for node in self.units if self._trains(node) for quantizer in
                      self._weights(node)) * self.config.iterations  # fmt: skip
        if self.tiar:
            modules = [self.prepared.get_submodule(name) for name in self.temporal]
            weights = sum(module.up.numel() for module in modules if isinstance(module, AdaRoundQuantizer))
            updates += weights * self.config.temporal_iterations
        if self.conditional is not None:
            found = self.conditional.quantizers(self.prepared).values()
            weights = sum(module.up.numel() for module in found if isinstance(module, AdaRoundQuantizer))
            updates += weights * self.config.temporal_iterations
        return updates >= WORTH_COMPILING

    def fingerprint(self, samples: Samples | None) -> str:
        """A hash of everything that decides the outcome."""
        plain = {
            "reconstruction": dataclasses.asdict(self.config),
            "quantization": {k: v for k, v in self.about["config"].items() if k != "reconstruction"},
            "timesteps": self.about["timesteps"],
            "units": [node.meta["tfmq_fx.unit"] for node in self.units],
            "versions": [torch.__version__, version("torchao"), torch.backends.cpu.get_cpu_capability(), code_digest()],
        }
        data = [] if samples is None else samples.tensors()
        conditionings = [] if self.pairs is None else list(self.pairs.conditionings.values())
        return fingerprint(plain, [*self.prepared.state_dict().values(), *conditionings, *data])

    def go(
        self, samples: Samples | None, store: ActivationStore, checkpoint: Checkpoint, bar: ReconstructionProgress
    ) -> list[UnitResult]:
        """Reconstruct every unit; finished ones of an earlier run are taken from the checkpoint."""
        results: list[UnitResult] = []
        if self.tiar:
            results.append(self._temporal_unit(checkpoint, bar))
        elif any(node.meta["tfmq_fx.unit"][1] == "temporal" for node in self.units):
            reason = "temporal='nearest'" if self.learns else "its weights are not quantized"
            results.append(UnitResult("temporal block", "temporal", reason=reason))
        if any(node.meta["tfmq_fx.unit"][1] == "conditional" for node in self.units):
            results.append(self._conditional_result(checkpoint, bar))
        if samples is not None:
            results += self._other_units(samples, store, checkpoint, bar)
        return results

    def _temporal_unit(self, checkpoint: Checkpoint, bar: ReconstructionProgress) -> UnitResult:
        quantizers = {name: module for name, module in quantizers_of(self.prepared).items() if name in self.temporal}
        found = checkpoint.load(0)
        if found is not None:
            load_state(quantizers, found[1])
            return self._resume(found[0], bar)
        bar.start("temporal block")
        inputs = sampled_rows(self.inputs, self.config.seed)
        result = reconstruct_temporal_block(
            self.prepared, self.timestep, inputs, self.config, bar.advance, compiled=self._updates_compiled()
        )
        if inputs is not self.inputs:
            self._observe()
        checkpoint.save(0, result, state_of(quantizers))
        return result

    def _conditional_result(self, checkpoint: Checkpoint, bar: ReconstructionProgress) -> UnitResult:
        # What leads to it is final by now.
        self._observe_conditional()
        (index,) = [1 + i for i, node in enumerate(self.units) if node.meta["tfmq_fx.unit"][1] == "conditional"]
        if self.conditional is None:
            reason = "its weights are not quantized"
            if self.config.temporal != "tiar":
                reason = f"temporal={self.config.temporal!r}"
            elif self.pairs is None:
                reason = "its conditionings, or the timesteps, are not known: pass batches, and timesteps= to prepare"
            return UnitResult("conditional part", "conditional", reason=reason)
        quantizers = self.conditional.quantizers(self.prepared)
        found = checkpoint.load(index)
        if found is not None:
            load_state(quantizers, found[1])
            if not self.config.learned_steps:
                self._observe_conditional()
            return self._resume(found[0], bar)
        bar.start("conditional part")
        try:
            result = reconstruct_conditional_part(
                self.prepared, self.conditional, self.config, bar.advance, compiled=self._updates_compiled()
            )
        except ReconstructionError as error:
            return UnitResult("conditional part", "conditional", reason=f"rounded to nearest: {error}")
        checkpoint.save(index, result, state_of(quantizers))
        return result

    def _resume(self, result: UnitResult, bar: ReconstructionProgress) -> UnitResult:
        self.resumed += 1
        self.earlier_seconds += result.seconds
        bar.skip(result.iterations)
        return result

    def _other_units(
        self, samples: Samples, store: ActivationStore, checkpoint: Checkpoint, bar: ReconstructionProgress
    ) -> list[UnitResult]:
        trained = [node for node in self.units if self._trains(node)]
        fisher = {}
        if self.config.fisher and trained:
            bar.start("Fisher information")
            fisher = fisher_information(self.graph_module, samples, set(trained), self.config.seed)
        results = {}
        for node in self.units:
            name, kind = node.meta["tfmq_fx.unit"]
            if node not in trained and kind not in EARLY:
                results[node] = UnitResult(name, kind, reason="its weights are not quantized")
        propagation = Propagation(self.graph_module, samples, store)
        remaining = set(trained)
        for node in self.graph_module.graph.nodes:
            if not remaining:
                break
            propagation.compute_float(node)
            if node in remaining:
                require_finite_targets(propagation, node, self.timestep)
                index = 1 + self.units.index(node)
                results[node] = self._unit(propagation, node, index, fisher.get(node), checkpoint, bar)
                remaining.remove(node)
            propagation.compute_quantized(node)
            propagation.release(node)
        return [results[node] for node in self.units if node in results]

    def _unit(
        self,
        propagation: Propagation,
        node: fx.Node,
        index: int,
        fisher: list[Tensor | None] | None,
        checkpoint: Checkpoint,
        bar: ReconstructionProgress,
    ) -> UnitResult:
        module = self.graph_module.get_submodule(str(node.target))
        quantizers = quantizers_of(module)
        found = checkpoint.load(index)
        if found is not None:
            load_state(quantizers, found[1])
            result = self._resume(found[0], bar)
        else:
            bar.start(node.meta["tfmq_fx.unit"][0])
            result = reconstruct_unit(
                propagation,
                node,
                self.config,
                fisher=fisher,
                seed=self.config.seed * SEED_STRIDE + index,
                on_iteration=bar.advance,
                compiled=self._updates_compiled(),
            )
            checkpoint.save(index, result, state_of(quantizers))
        log.info("unit %s: error %.3g, rounded to nearest %.3g", result.name, result.after, result.before)
        if not self.config.learned_steps and any(m in quantizers.values() for m in self._time_path_modules()):
            # Layers of the time path inside this unit: what follows them there sees other values now.
            self._observe()
        return result

    def _time_path_modules(self) -> list[nn.Module]:
        named = {str(node.target) for node in self.path.nodes if node.op == "call_module"}
        return [self.prepared.get_submodule(name) for name in self.temporal | named]


def _pairs(prepared: fx.GraphModule, about: dict[str, Any], batches: list[Batch]) -> ConditionedTimesteps | None:
    """All timesteps with the conditionings of the batches; None where there are none, or no layer takes them."""
    conditionings = prepared_conditionings(about)
    if conditionings is None or not batches:
        return None
    interface = interface_of(prepared)
    for index, batch in enumerate(batches):
        conditionings.add(prepared, bind_batch(interface, index, batch, about["timestep"]))
    return conditionings.with_timesteps(distinct_timesteps(about["timesteps"]), about["timestep"])
