"""The units of the time path of one run: the temporal block, and the conditional part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.frontend.batches import Batch
from tfmq_fx.passes.support.timestep_values import distinct_timesteps
from tfmq_fx.reconstruction.time_path import TimePathUnit, conditional_unit, temporal_quantizers, temporal_unit
from tfmq_fx.temporal.domain import conditioned_domain, schedule_domain, time_path
from tfmq_fx.temporal.inputs import collect_conditionings

__all__ = ["TimePathUnits", "find_time_path_units"]


@dataclass(frozen=True, eq=False)
class TimePathUnits:
    """The units of the time path of a prepared graph.

    Attributes:
        prepared: The graph with fake quantizers.
        block: The temporal block; None without a schedule, or where nothing of it is quantized.
        conditional: What depends on the timestep and the conditioning; None where these are not known.
        quantizes_weights: Whether the temporal block has weights whose rounding can be learned.
    """

    prepared: fx.GraphModule
    block: TimePathUnit | None
    conditional: TimePathUnit | None
    quantizes_weights: bool

    @property
    def all(self) -> list[TimePathUnit]:
        """The units that exist, in the order in which they run."""
        return [unit for unit in (self.block, self.conditional) if unit is not None]

    def observe(self) -> None:
        """Give every activation of the time path the exact range of what it sees over its domain."""
        for unit in self.all:
            unit.observe(self.prepared)

    def modules(self) -> list[nn.Module]:
        """The observers and fake quantizers that the time path calls."""
        nodes = [node for unit in self.all for node in time_path(self.prepared, unit.domain).nodes]
        return [self.prepared.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]


def find_time_path_units(
    prepared: fx.GraphModule, state: PreparedState, config: ReconstructionConfig, batches: list[Batch]
) -> TimePathUnits:
    """Find the units of the time path of a graph with fake quantizers.

    Raises:
        ConfigError: The timesteps are missing.
    """
    timesteps = None if state.timesteps is None else distinct_timesteps(state.timesteps)
    temporal = temporal_quantizers(prepared, state.timestep)
    quantizes_weights = any(isinstance(module, AdaRoundQuantizer) for module in temporal.values())
    domain = schedule_domain(prepared, state.timestep, timesteps)
    if quantizes_weights and domain is None and config.temporal != "nearest":
        msg = "the temporal block is reconstructed over the schedule's timesteps: pass timesteps= to prepare"
        raise ConfigError(msg)
    block = None if domain is None or not temporal else temporal_unit(prepared, domain)
    conditional = None
    if state.conditions and timesteps is not None and batches:
        conditionings = collect_conditionings(prepared, state.path_inputs, batches, state.timestep)
        pairs = conditioned_domain(state.timestep, timesteps, conditionings)
        conditional = conditional_unit(prepared, pairs, state.conditions)
    return TimePathUnits(prepared, block, conditional, quantizes_weights)
