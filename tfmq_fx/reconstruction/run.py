"""One run of reconstruction: the time path first, then unit by unit in the order of the graph."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial

from torch import Tensor, fx

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import ActivationQuantizer, AdaRoundQuantizer, quantizers_of
from tfmq_fx.frontend.batches import Batch
from tfmq_fx.passes import PartitionUnits
from tfmq_fx.passes.analysis.reconstruction_units import EARLY
from tfmq_fx.passes.support.predicates import is_weighted
from tfmq_fx.reconstruction.finite_targets import require_finite_targets
from tfmq_fx.reconstruction.fisher import fisher_information
from tfmq_fx.reconstruction.layer_rounding import weight_quantizer
from tfmq_fx.reconstruction.once import OnceEach
from tfmq_fx.reconstruction.propagation import Propagation
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.samples import Samples
from tfmq_fx.reconstruction.store import ActivationStore
from tfmq_fx.reconstruction.time_path import TimePathUnit, reconstruct_time_path
from tfmq_fx.reconstruction.time_path_layers import TimePathLayer, time_path_layers
from tfmq_fx.reconstruction.time_path_prediction import SWEEPS, round_for_prediction
from tfmq_fx.reconstruction.time_path_units import find_time_path_units
from tfmq_fx.reconstruction.training import WORTH_COMPILING
from tfmq_fx.reconstruction.unit import reconstruct_unit, trainable_weights
from tfmq_fx.reconstruction.whole_model import train_whole_model

__all__ = ["ReconstructionRun"]

log = logging.getLogger(__name__)
#: Seeds of units are this far apart, so that no two share one whatever the seed of the run.
SEED_STRIDE = 1_000_003
NOT_QUANTIZED = "its weights are not quantized"


class ReconstructionRun:
    """One reconstruction: the partitioned graph and what is counted on the way.

    Args:
        prepared: A graph with fake quantizers, updated in place.
        state: Its state.
        config: How to reconstruct.
        batches: The calibration batches.

    Raises:
        ConfigError: The timesteps are missing.
    """

    def __init__(
        self, prepared: fx.GraphModule, state: PreparedState, config: ReconstructionConfig, batches: list[Batch]
    ) -> None:
        self.prepared, self.state, self.config, self.timestep = prepared, state, config, state.timestep
        self.time_path = find_time_path_units(prepared, state, config, batches)
        # The temporal block, where it is rounded by what the model's result does with its errors.
        by_features = not batches or config.resolved_temporal_objective == "features"
        self.for_prediction = None if by_features else self.time_path.block
        for quantizer in quantizers_of(prepared).values():
            if isinstance(quantizer, AdaRoundQuantizer):
                quantizer.round_to_nearest()
            elif isinstance(quantizer, ActivationQuantizer):
                quantizer.forget_step()
        self.time_path.observe()
        # A copy of the graph alone: it shares every tensor and quantizer with the one that came in.
        self.graph_module = fx.GraphModule(prepared, copy.deepcopy(prepared.graph))
        PartitionUnits(
            timestep=self.timestep,
            granularity="layer" if config.granularity == "layer" else "block",
            temporal=config.temporal != "blocks",
            conditions=state.conditions,
        )(self.graph_module)
        self.units = [node for node in self.graph_module.graph.nodes if "tfmq_fx.unit" in node.meta]

    def _learning(self) -> list[TimePathUnit]:
        """The parts of the time path that learn from their own output."""
        return [unit for unit in self.time_path.all if unit.weights and self.config.temporal == "tiar"]

    def _layers(self) -> list[TimePathLayer]:
        """The layers of these parts, where they are rounded one by one."""
        units = [unit for unit in self._learning() if self.config.rounds_columns and unit is not self.for_prediction]
        return [layer for unit in units for layer in time_path_layers(self.prepared, unit)]

    def _weights(self, node: fx.Node) -> list[AdaRoundQuantizer]:
        return trainable_weights(self.graph_module.get_submodule(str(node.target)))

    def _trains(self, node: fx.Node) -> bool:
        """Whether a unit's rounding is learned by its own output's error over calibration samples."""
        own = self.config.granularity != "none" and node.meta["tfmq_fx.unit"][1] not in EARLY and self._weights(node)
        return bool(own) and (not self.config.rounds_columns or self._rounds(node))

    def _rounds(self, node: fx.Node) -> bool:
        """Whether GPTQ knows the layers of a unit."""
        module = self.graph_module.get_submodule(str(node.target))
        assert isinstance(module, fx.GraphModule)
        return all(weight_quantizer(module, layer) for layer in module.graph.nodes if is_weighted(layer))

    def iterations(self) -> int:
        """Training steps of the whole run, and sweeps; with GPTQ, layers."""
        config, units = self.config, sum(self._trains(node) for node in self.units)
        learning = [unit for unit in self._learning() if unit is not self.for_prediction]
        count = SWEEPS * (len(self._learning()) - len(learning))
        if config.rounds_columns:
            return count + len(self._layers()) + units + config.iterations * config.trains_whole_model
        count += (config.iterations + config.step_iterations(config.iterations)) * units
        temporal = config.temporal_iterations + config.step_iterations(config.temporal_iterations)
        return count + temporal * len(learning)

    def _updates_compiled(self) -> bool:
        """Whether the run has enough weights and iterations to compile their update."""
        trained = sum(w.up.numel() for node in self.units if self._trains(node) for w in self._weights(node))
        learning = sum(weight.up.numel() for unit in self._learning() for weight in unit.weights)
        return trained * self.config.iterations + learning * self.config.temporal_iterations >= WORTH_COMPILING

    def go(self, samples: Samples | None, store: ActivationStore, once: OnceEach) -> list[UnitResult]:
        """Reconstruct every unit; finished ones of an earlier run are taken from where they are kept."""
        self._once = once
        results = []
        kinds = [node.meta["tfmq_fx.unit"][1] for node in self.units]
        block = self.time_path.block
        if block is not None and block in self._learning():
            results += self._block_results(block, samples)
        elif "temporal" in kinds:
            reason = "temporal='nearest'" if self.time_path.quantizes_weights else NOT_QUANTIZED
            results.append(UnitResult("temporal block", "temporal", reason=reason))
        if "conditional" in kinds:
            results += self._conditional_results(1 + kinds.index("conditional"))
        if samples is not None and self.config.granularity != "none":
            results += self._other_units(samples, store)
            results += [self._whole(samples)] if self.config.trains_whole_model else []
        return results

    def _block_results(self, block: TimePathUnit, samples: Samples | None) -> list[UnitResult]:
        if samples is None or block is not self.for_prediction:
            return self._time_path_results(block, 0)
        choose = partial(round_for_prediction, self.prepared, block, self.config, samples, self._once.bar.advance)
        try:
            return self._part_once(block, 0, choose)
        except ReconstructionError as error:
            if self.config.temporal_objective is not None:
                raise
            log.warning("%s; it is reconstructed by its features", error)
            self.for_prediction = None
            return self._time_path_results(block, 0)

    def _conditional_results(self, index: int) -> list[UnitResult]:
        unit = self.time_path.conditional
        reason = NOT_QUANTIZED
        if unit is not None:
            # What leads to it is final by now.
            unit.observe(self.prepared)
        if self.config.temporal != "tiar":
            reason = f"temporal={self.config.temporal!r}"
        elif unit is None:
            reason = "its conditionings, or the timesteps, are not known: pass batches, and timesteps= to prepare"
        elif unit.weights:
            try:
                return self._time_path_results(unit, index)
            except ReconstructionError as error:
                reason = f"rounded to nearest: {error}"
        return [UnitResult("conditional part", "conditional", reason=reason)]

    def _time_path_results(self, unit: TimePathUnit, index: int) -> list[UnitResult]:
        if self.config.rounds_columns:
            return self._time_path_layers(unit)

        def reconstruct() -> UnitResult:
            compiled = self._updates_compiled()
            return reconstruct_time_path(self.prepared, unit, self.config, self._once.bar.advance, compiled=compiled)

        return self._part_once(unit, index, reconstruct)

    def _part_once(self, unit: TimePathUnit, index: int, compute: Callable[[], UnitResult]) -> list[UnitResult]:
        result, computed = self._once.run(index, unit.name, unit.quantizers, compute)
        if not computed and not self.config.learned_steps:
            unit.observe(self.prepared)
        return [result]

    def _time_path_layers(self, unit: TimePathUnit) -> list[UnitResult]:
        results = []
        for number, layer in enumerate(self._layers(), 1 + len(self.units)):
            if layer.unit is unit:
                compute = partial(layer.round, self.prepared, self.config, self._once.bar.advance)
                results.append(self._once.run(number, layer.name, {"weight": layer.quantizer}, compute)[0])
                layer.settle(self.prepared)
        return results

    def _other_units(self, samples: Samples, store: ActivationStore) -> list[UnitResult]:
        trained = [node for node in self.units if self._trains(node)]
        fisher = {}
        if self.config.fisher and trained:
            self._once.bar.start("Fisher information")
            fisher = fisher_information(self.graph_module, samples, set(trained), self.config.seed)
        results = {}
        for node in self.units:
            name, kind = node.meta["tfmq_fx.unit"]
            if node not in trained and kind not in EARLY:
                unknown = "GPTQ rounds linears and convolutions; this stays rounded to nearest"
                results[node] = UnitResult(name, kind, reason=unknown if self._weights(node) else NOT_QUANTIZED)
        propagation = Propagation(self.graph_module, samples, store)
        remaining = set(trained)
        for node in self.graph_module.graph.nodes:
            if not remaining:
                break
            propagation.compute_float(node)
            if node in remaining:
                require_finite_targets(propagation, node, self.timestep)
                index = 1 + self.units.index(node)
                results[node] = self._unit(propagation, node, index, fisher.get(node))
                remaining.remove(node)
            propagation.compute_quantized(node)
            propagation.release(node)
        return [results[node] for node in self.units if node in results]

    def _whole(self, samples: Samples) -> UnitResult:
        """Train what lies outside the time path together; behind its layers' numbers it has the next one."""
        fixed, index = self.time_path.modules(), 1 + len(self.units) + len(self._layers())
        trained = {name: module for name, module in quantizers_of(self.prepared).items() if module not in fixed}
        arguments = self.prepared, samples, [*trained.values()], self.config, self._once.bar.advance
        train = partial(train_whole_model, *arguments, self._once.training(index))
        return self._once.run(index, "whole model", trained, train)[0]

    def _unit(
        self, propagation: Propagation, node: fx.Node, index: int, fisher: list[Tensor | None] | None
    ) -> UnitResult:
        quantizers = quantizers_of(self.graph_module.get_submodule(str(node.target)))

        def reconstruct() -> UnitResult:
            return reconstruct_unit(
                propagation,
                node,
                self.config,
                fisher=fisher,
                seed=self.config.seed * SEED_STRIDE + index,
                on_iteration=self._once.bar.advance,
                compiled=self._updates_compiled(),
            )

        result, _ = self._once.run(index, node.meta["tfmq_fx.unit"][0], quantizers, reconstruct)
        log.info("unit %s: error %.3g, rounded to nearest %.3g", result.name, result.after, result.before)
        if not self.config.learned_steps and any(m in quantizers.values() for m in self.time_path.modules()):
            # Layers of the time path inside this unit: what follows them there sees other values now.
            self.time_path.observe()
        return result
