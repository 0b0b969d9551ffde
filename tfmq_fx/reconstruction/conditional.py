r"""The conditional part learns from its own output alone, as the temporal block does.

.. math::
    L = \sum_{(t, c)} \sum_i \| g_i(t, c) - \hat g_i(t, c) \|^2

over the timesteps ``t`` of the schedule and the conditionings ``c`` of the calibration batches. Where a prompt's
embedding is added before the embedding layers ``g_i`` (SDXL, LCM, SD3, Flux), they depend on both, and never on the
sample: no image is needed. The objective is TIAR's (TFMQ-DM, CVPR 2024, section 5); pairs are our extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, FakeQuantizer, TimestepQuantizer, quantizers_of
from tfmq_fx.passes.analysis import ReconstructionUnit, TemporalBlock, find_temporal_block, outside_block
from tfmq_fx.passes.support.predicates import is_weighted
from tfmq_fx.passes.support.sizes import concrete_size
from tfmq_fx.passes.support.subgraphs import known_value
from tfmq_fx.reconstruction.own_output import learn_own_output, training_over_rows
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.temporal.conditional_calibration import observe_pairs
from tfmq_fx.temporal.conditionings import ConditionedTimesteps
from tfmq_fx.temporal.finite_set_calibration import timestep_sites

__all__ = ["ConditionalUnit", "observe_conditional_part", "reconstruct_conditional_part"]

#: Numbers that training keeps of all its pairs together: what goes in, and what comes out of the last layers.
MOST_NUMBERS = 2**26
NAME, KIND = "conditional part", "conditional"


@torch.no_grad()
def observe_conditional_part(prepared: fx.GraphModule, path: TemporalBlock, pairs: ConditionedTimesteps) -> None:
    """Give every activation with parameters per timestep outside the temporal block the exact range over the pairs.

    Args:
        prepared: A graph with fake quantizers, updated in place.
        path: Its time path with the conditioning.
        pairs: Timesteps and conditionings.
    """
    nodes = outside_block(path, find_temporal_block(prepared, path.timestep))
    observe_pairs(prepared, path, timestep_sites(prepared, nodes), pairs)


@dataclass(frozen=True)
class ConditionalUnit:
    """The conditional part of a prepared graph as a reconstruction unit.

    Attributes:
        unit: Its nodes.
        path: The time path with the conditioning, which leads to it.
        pairs: Timesteps and conditionings.
    """

    unit: ReconstructionUnit
    path: TemporalBlock
    pairs: ConditionedTimesteps

    def quantizers(self, prepared: fx.GraphModule) -> dict[str, FakeQuantizer]:
        """The fake quantizers that it alone calls, by name."""
        members = set(self.unit.nodes)
        inside: dict[str, bool] = {}
        for node in prepared.graph.nodes:
            if node.op == "call_module":
                name = str(node.target)
                inside[name] = inside.get(name, True) and node in members
        modules = quantizers_of(prepared)
        return {name: modules[name] for name, own in inside.items() if own and name in modules}

    def last_layers(self) -> list[fx.Node]:
        """Its layers that no other of its layers follows: the ``g_i``."""
        members, followed = set(self.unit.nodes), set[fx.Node]()
        for node in reversed(self.unit.nodes):
            if any(user in members and (user in followed or is_weighted(user)) for user in node.users):
                followed.add(node)
        return [layer for layer in self.unit.weighted if layer not in followed]


def reconstruct_conditional_part(
    prepared: fx.GraphModule,
    part: ConditionalUnit,
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    *,
    compiled: bool = False,
) -> UnitResult:
    """Learn the rounding of all weights of the conditional part jointly, behind the temporal block as it is.

    Ranges per timestep follow the weights while these learn, and are those of all pairs at the end; activations with
    one range for all timesteps keep that of calibration. With ``learned_steps`` all of them are trained instead.

    Args:
        prepared: A graph with fake quantizers; those of the part are updated in place.
        part: What to reconstruct.
        config: Iterations and schedules.
        on_iteration: Called after each iteration with its number and the loss.
        compiled: Whether to compile the update of the weights.

    Returns:
        The error on the pairs before and after, as :class:`UnitResult`.

    Raises:
        ReconstructionError: The part cannot be evaluated for all pairs at once.
    """
    quantizers = list(part.quantizers(prepared).values())
    if not any(isinstance(quantizer, AdaRoundQuantizer) for quantizer in quantizers):
        return UnitResult(NAME, KIND, reason="its weights are not quantized")
    outputs = part.last_layers()
    pairs = part.pairs.sampled(_affordable(prepared, part.pairs, outputs), config.seed)
    training = training_over_rows(
        prepared,
        part.unit.nodes,
        outputs,
        pairs.columns(),
        members=part.path.nodes,
        observe=lambda: observe_conditional_part(prepared, part.path, part.pairs),
    )
    following = [quantizer for quantizer in quantizers if isinstance(quantizer, TimestepQuantizer)]
    result = learn_own_output(
        NAME, KIND, quantizers, following, training, config, on_iteration, compiled=compiled
    )  # fmt: skip
    if not config.learned_steps:
        observe_conditional_part(prepared, part.path, part.pairs)
    return result


def _affordable(prepared: fx.GraphModule, pairs: ConditionedTimesteps, outputs: Collection[fx.Node]) -> int:
    """How many pairs training has room for, one at least."""
    one = sum(values[0].numel() for values in pairs.conditionings.values())
    for node in outputs:
        value = known_value(prepared, node)
        assert isinstance(value, Tensor)
        one += math.prod(concrete_size(size, 1) for size in value.shape)
    return max(1, MOST_NUMBERS // max(1, one))
