r"""Temporal information aware reconstruction (TIAR): the time path learns from its own output alone.

.. math::
    L = \sum_{x \in D} \sum_i \| g_i(x) - \hat g_i(x) \|^2

over all entries ``x`` of its domain ``D`` and all embedding layers ``i``, without any image. The temporal block is a
function of the timestep, so all timesteps of the schedule are the batch (TFMQ-DM, CVPR 2024, section 5, temporal
information block based reconstruction). Where a prompt's embedding is added before the embedding layers (SDXL, LCM,
SD3, Flux), these form a second unit, over pairs of timestep and conditioning, which is our extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor, fx

from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, FakeQuantizer, quantizers_of
from tfmq_fx.passes.analysis import find_temporal_block, find_units
from tfmq_fx.passes.support.predicates import is_weighted
from tfmq_fx.passes.support.sizes import concrete_size
from tfmq_fx.passes.support.subgraphs import known_value
from tfmq_fx.reconstruction.domain_training import prepare_domain_training, train_over_domain
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.temporal.calibrate import block_sites, calibrate_over, conditional_sites
from tfmq_fx.temporal.domain import TemporalDomain, time_path

__all__ = ["TimePathUnit", "conditional_unit", "reconstruct_time_path", "sampled_domain", "temporal_quantizers",
           "temporal_unit"]  # fmt: skip

#: Entries of a finite domain that are trained on together; a schedule has fewer, timesteps and classes may be more.
MOST_ENTRIES = 4096
#: Numbers that training keeps of all sampled entries together: what goes in, and what comes out of the last layers.
MOST_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class TimePathUnit:
    """A part of the time path of a prepared graph as a reconstruction unit.

    Attributes:
        name: What reports call it.
        kind: ``"temporal"`` or ``"conditional"``.
        domain: What it is calibrated and trained over.
        nodes: Its nodes, in the order of the graph.
        outputs: The layers ``g_i`` among them.
        sites: Calls of activations whose ranges are those of the domain.
        quantizers: The fake quantizers that it alone calls, by name.
    """

    name: str
    kind: str
    domain: TemporalDomain
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sites: tuple[fx.Node, ...]
    quantizers: dict[str, FakeQuantizer]

    @property
    def weights(self) -> list[AdaRoundQuantizer]:
        """The weights that learn their rounding."""
        return [module for module in self.quantizers.values() if isinstance(module, AdaRoundQuantizer)]

    def observe(self, prepared: fx.GraphModule) -> None:
        """Give every activation at the sites the exact range of what it sees over the domain."""
        calibrate_over(prepared, self.domain, self.sites)


def temporal_quantizers(prepared: fx.GraphModule, timestep: str = "timestep") -> dict[str, FakeQuantizer]:
    """The fake quantizers that only the temporal block calls, by name."""
    return _exclusive_quantizers(prepared, find_temporal_block(prepared, timestep).nodes)


def temporal_unit(prepared: fx.GraphModule, domain: TemporalDomain) -> TimePathUnit:
    """The temporal block as a unit.

    Args:
        prepared: A graph with fake quantizers.
        domain: The timesteps of the schedule, with the values of further finite inputs.
    """
    block = find_temporal_block(prepared, domain.timestep)
    return TimePathUnit(
        "temporal block",
        "temporal",
        domain,
        nodes=block.nodes,
        outputs=tuple(layer.linear for layer in block.embedding_layers) or block.time_embedding[-1:],
        sites=tuple(block_sites(prepared, domain.timestep)),
        quantizers=_exclusive_quantizers(prepared, block.nodes),
    )


def conditional_unit(prepared: fx.GraphModule, domain: TemporalDomain, conditions: Collection[str]) -> TimePathUnit:
    """What depends on the timestep and the conditioning, but never on the sample, as a unit.

    Its activations with one range for all timesteps keep that of calibration. It has no nodes where such layers have
    to be reconstructed with the blocks that read them.

    Args:
        prepared: A graph with fake quantizers.
        domain: Timesteps and conditionings.
        conditions: Names of the conditioning inputs.
    """
    units = find_units(prepared, domain.timestep, conditions=tuple(conditions))
    conditional = next((unit for unit in units if unit.kind == "conditional"), None)
    nodes = () if conditional is None else conditional.nodes
    return TimePathUnit(
        "conditional part",
        "conditional",
        domain,
        nodes=nodes,
        outputs=_last_layers(nodes),
        sites=tuple(conditional_sites(prepared, domain)),
        quantizers=_exclusive_quantizers(prepared, nodes),
    )


def _exclusive_quantizers(prepared: fx.GraphModule, nodes: Collection[fx.Node]) -> dict[str, FakeQuantizer]:
    """The fake quantizers that no other node calls."""
    members = set(nodes)
    inside: dict[str, bool] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            inside[name] = inside.get(name, True) and node in members
    modules = quantizers_of(prepared)
    return {name: modules[name] for name, alone in inside.items() if alone and name in modules}


def _last_layers(nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The layers that no other of the layers follows."""
    members, followed = set(nodes), set[fx.Node]()
    for node in reversed(nodes):
        if any(user in members and (user in followed or is_weighted(user)) for user in node.users):
            followed.add(node)
    return tuple(node for node in nodes if is_weighted(node) and node not in followed)


def reconstruct_time_path(
    prepared: fx.GraphModule,
    unit: TimePathUnit,
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    *,
    compiled: bool = False,
) -> UnitResult:
    """Learn the rounding of all weights of a part of the time path jointly, behind what leads to it as it is.

    While they learn, the ranges at the sites are the exact ones of the moment, so what is trained is what calibration
    over the same domain gives at the end. With ``learned_steps`` the step sizes of all activations are trained instead,
    from the ranges at the start.

    Args:
        prepared: A graph with fake quantizers; those of the unit are updated in place.
        unit: What to reconstruct.
        config: Iterations and schedules.
        on_iteration: Called after each iteration with its number and the loss.
        compiled: Whether to compile the update of the weights.

    Returns:
        The error over the domain before and after, as :class:`UnitResult`.

    Raises:
        ReconstructionError: The part cannot be evaluated for all entries at once.
    """
    if not unit.weights:
        return UnitResult(unit.name, unit.kind, reason="its weights are not quantized")
    unit.observe(prepared)
    domain = sampled_domain(prepared, unit, config.seed)
    members = time_path(prepared, domain).nodes
    training = prepare_domain_training(prepared, unit.nodes, unit.outputs, domain, members=members)
    at_sites = {prepared.get_submodule(str(site.target)) for site in unit.sites}
    quantizers = list(unit.quantizers.values())
    following = [module for module in quantizers if module in at_sites and not isinstance(module, AdaRoundQuantizer)]
    result = train_over_domain(
        unit.name, unit.kind, quantizers, following, training, config, on_iteration, compiled=compiled
    )
    if not config.learned_steps:
        # Of the whole domain, not of what was drawn of it.
        unit.observe(prepared)
    return result


def sampled_domain(prepared: fx.GraphModule, unit: TimePathUnit, seed: int) -> TemporalDomain:
    """What a part is reconstructed over: its domain, or a choice of a very large one."""
    return unit.domain.sampled(_most_entries(prepared, unit), seed)


def _most_entries(prepared: fx.GraphModule, unit: TimePathUnit) -> int:
    """How many entries to train on, one at least."""
    if unit.kind == "temporal":
        # All of a finite domain that is not huge: nothing stands for an entry that is left out.
        return MOST_ENTRIES
    one = sum(values[0].numel() for name, values in unit.domain.values.items() if name != unit.domain.timestep)
    for node in unit.outputs:
        value = known_value(prepared, node)
        assert isinstance(value, Tensor)
        one += math.prod(concrete_size(size, 1) for size in value.shape)
    return max(1, MOST_NUMBERS // max(1, one))
