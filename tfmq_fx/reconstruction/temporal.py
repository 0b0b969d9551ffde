r"""Temporal information aware reconstruction (TIAR): the temporal block learns from its own output alone.

.. math::
    L = \sum_t \sum_i \| g_i(h(t)) - \hat g_i(\hat h(t)) \|^2

over all timesteps ``t`` of the schedule and all embedding layers ``i``, without any image: the block is a
function over a finite set, so the whole set is the batch. Source: TFMQ-DM (CVPR 2024), section 5,
temporal information block based reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    AdaRoundQuantizer,
    FakeQuantizer,
    TimestepQuantizer,
    quantizers_of,
)
from tfmq_fx.passes.analysis import TemporalBlock, evaluate_temporal_nodes, find_temporal_block, row_columns
from tfmq_fx.reconstruction.own_output import learn_own_output, observing, training_over_rows
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.temporal.refusal import refused_rows

__all__ = ["observe_temporal_block", "reconstruct_temporal_block", "sampled_rows", "temporal_quantizers"]

#: Rows of the full batch; a schedule has fewer, the pairs of timestep and class may be more.
MOST_ROWS = 4096


def temporal_quantizers(prepared: fx.GraphModule, block: TemporalBlock) -> list[FakeQuantizer]:
    """The fake quantizers that only the temporal block calls."""
    called = {str(node.target): node in block for node in prepared.graph.nodes if node.op == "call_module"}
    modules = quantizers_of(prepared)
    return [modules[name] for name, inside in called.items() if inside and name in modules]


def sampled_rows(inputs: Mapping[str, Tensor], seed: int) -> Mapping[str, Tensor]:
    """The rows that TIAR trains on: all of them up to :data:`MOST_ROWS`, beyond it a random choice of as many."""
    count = len(next(iter(inputs.values())))
    if count <= MOST_ROWS:
        return inputs
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:MOST_ROWS]
    return {name: column[chosen] for name, column in inputs.items()}


@torch.no_grad()
def observe_temporal_block(prepared: fx.GraphModule, timestep: str, inputs: Mapping[str, Tensor]) -> None:
    """Give every activation of the block the exact range of what it sees over the schedule (FSC).

    Args:
        prepared: A graph with fake quantizers; those of the temporal block are updated in place.
        timestep: Name of the timestep placeholder.
        inputs: By name, the timesteps of the schedule and the values of further finite inputs, ``[K]`` each.
    """
    _observe(prepared, find_temporal_block(prepared, timestep), inputs)


def _observe(prepared: fx.GraphModule, block: TemporalBlock, inputs: Mapping[str, Tensor]) -> None:
    items = inputs[block.timestep]
    with refused_rows(row_columns(prepared).get(block.timestep, items), items):
        _observe_sites(prepared, block, inputs)


def _observe_sites(prepared: fx.GraphModule, block: TemporalBlock, inputs: Mapping[str, Tensor]) -> None:
    sites = _activations(temporal_quantizers(prepared, block))

    def evaluate(nodes: Sequence[fx.Node]) -> list[Tensor]:
        return evaluate_temporal_nodes(prepared, block.nodes, nodes, inputs)

    if all(isinstance(site, TimestepQuantizer) for site in sites):
        with observing(sites):
            evaluate(block.linears if sites else ())
        return
    # A range that all timesteps share is known only when all have been seen, and some graphs take one at a
    # time: site by site, each behind those that are settled.
    modules = quantizers_of(prepared)
    for node in block.nodes:
        site = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(site, TimestepQuantizer):
            with observing([site]):
                evaluate([node])
        elif isinstance(site, ActivationQuantizer):
            (seen,) = evaluate([node.args[0]])  # type: ignore[list-item]  # a node
            with observing([site]):
                site(seen)


def _activations(quantizers: list[FakeQuantizer]) -> list[ActivationQuantizer | TimestepQuantizer]:
    return [quantizer for quantizer in quantizers if not isinstance(quantizer, AdaRoundQuantizer)]


def reconstruct_temporal_block(
    prepared: fx.GraphModule,
    timestep: str,
    inputs: Mapping[str, Tensor],
    config: ReconstructionConfig,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    *,
    compiled: bool = False,
) -> UnitResult:
    """Learn the rounding of all weights of the temporal block jointly.

    While they learn, each activation's range is the exact one of the moment, so what is trained is what
    finite set calibration gives at the end. With ``learned_steps`` the tables are trained instead, from
    the ranges at the start.

    Args:
        prepared: A graph with fake quantizers; those of the temporal block are updated in place.
        timestep: Name of the timestep placeholder.
        inputs: By name, the timesteps of the schedule and the values of further finite inputs, ``[K]`` each.
        config: Iterations and schedules.
        on_iteration: Called after each iteration with its number and the loss.
        compiled: Whether to compile the update of the weights.

    Returns:
        The error before and after, as :class:`UnitResult`.

    Raises:
        ReconstructionError: The block cannot be evaluated for all timesteps at once.
    """
    block = find_temporal_block(prepared, timestep)
    quantizers = temporal_quantizers(prepared, block)
    if not any(isinstance(quantizer, AdaRoundQuantizer) for quantizer in quantizers):
        return UnitResult("temporal block", "temporal", reason="its weights are not quantized")
    training = training_over_rows(
        prepared,
        block.nodes,
        [layer.linear for layer in block.embedding_layers] or [block.time_embedding[-1]],
        inputs,
        members=block.nodes,
        observe=lambda: _observe(prepared, block, inputs),
    )
    return learn_own_output(
        "temporal block", "temporal", quantizers, _activations(quantizers), training, config, on_iteration,
        compiled=compiled,
    )  # fmt: skip
