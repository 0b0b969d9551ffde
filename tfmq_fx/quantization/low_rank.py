"""The part of a weight that a branch of low rank takes over, so that what is quantized is small.

With :math:`W = U D + R` a layer computes :math:`Q(R) Q(x) + U D x`: what quantization of the activation loses is
weighted by :math:`R` alone, and the scales of the weight have its range alone. The norm of :math:`R` is least where
:math:`U D` is the truncated singular value decomposition of :math:`W` (its channels scaled before,
:mod:`tfmq_fx.quantization.equalize`). The factors have 8 bits; :math:`R` is what is left of :math:`W` behind their
rounding, so that their width costs nothing but a little of its norm. Source: SVDQuant (ICLR 2025), section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.observers import PerChannelWeightObserver, TimestepObserver
from tfmq_fx.observers.finite import weight_of
from tfmq_fx.passes import AddLowRankBranches, PropagateValues
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.analysis.layer_names import layer_name
from tfmq_fx.passes.layout.add_low_rank_branches import LowRankFactors, branched_weight
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.quantization.float_layers import FloatLayers

__all__ = ["BRANCH_BITS", "MOST_WORK", "add_branches", "branch_rank", "low_rank_factors"]

#: Width of the factors of a branch.
BRANCH_BITS = 8
#: The most multiply-adds of a branch, relative to those of its layer: a narrow layer's branch has a lower rank.
MOST_WORK = 0.5


def low_rank_factors(weight: Tensor, rank: int) -> LowRankFactors:
    """The factors of the nearest weight of a rank, on the grids that they are quantized to.

    Args:
        weight: Float, ``[K, C]`` or ``[K, C, *kernel]``.
        rank: ``r``; no more than the weight itself has.
    """
    matrix = weight.detach().flatten(1).double()
    rank = min(rank, *matrix.shape)
    tall = matrix.shape[0] > matrix.shape[1]
    side = matrix.mT if tall else matrix
    # Vectors of the smaller side; eigenvalues ascend. The other side has the singular values in it.
    vectors = torch.linalg.eigh(side @ side.mT).eigenvectors[:, -rank:]
    others = vectors.mT @ side
    if tall:
        # A row of ``up`` has one scale: singular values belong into ``down``, where they have rows of their own.
        size = others.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        up, down = (others / size).mT, size * vectors.mT
    else:
        up, down = vectors, others
    return LowRankFactors(_on_grid(down).reshape(rank, *weight.shape[1:]), _on_grid(up))


def _observer(name: str) -> PerChannelWeightObserver:
    return PerChannelWeightObserver(BRANCH_BITS, symmetric=True, search=False, subject=weight_of(name))


def _on_grid(factor: Tensor) -> Tensor:
    """What is left of a factor behind its rounding, float32."""
    observer = _observer("")
    observer(factor.to(torch.float32))
    return observer.dequantized()


def branch_rank(weight: Tensor, rank: int) -> int:
    """The rank of a layer's branch: ``rank``, or the largest with :data:`MOST_WORK` of the layer's work; 0 for none.

    Beyond it, the branch would cost what the layer costs in float, which loses nothing.

    Args:
        weight: That of the layer, ``[K, C]`` or ``[K, C, *kernel]``.
        rank: What is asked for.
    """
    outputs, inputs = len(weight), weight[0].numel()
    return min(rank, int(MOST_WORK * outputs * inputs / (outputs + inputs)))


def _is_observed_over_time(layer: fx.Node, prepared: fx.GraphModule) -> bool:
    """Whether a layer's activation has exact ranges for the timesteps: the time path is not wide, and has a table."""
    source: Any = layer.args[0]
    observer = prepared.get_submodule(str(source.target)) if source.op == "call_module" else None
    return isinstance(observer, TimestepObserver)


@torch.no_grad()
def add_branches(prepared: fx.GraphModule, config: QuantizationConfig, timestep: str, finite: tuple[str, ...]) -> int:
    """Give the layers of a calibrated graph the branches that the configuration asks for, in place.

    Layers of the temporal block and those without a quantized weight are left alone, and those that
    :func:`~tfmq_fx.passes.layout.add_low_rank_branches.branched_weight` does not take; narrow ones get a lower rank
    (:func:`branch_rank`).

    Args:
        prepared: The graph, its channels scaled.
        config: Of the whole graph; ``low_rank`` of each layer counts.
        timestep: Name of the timestep input.
        finite: Names of the further inputs of the temporal block.

    Returns:
        How many layers have one now that had none.
    """
    asked = [config.low_rank, *(values.get("low_rank") for values in config.overrides.values())]
    if not any(asked):
        return 0
    block = find_temporal_block(prepared, timestep, finite=finite)
    layers = FloatLayers.of(prepared, config, block)
    factors: dict[str, LowRankFactors] = {}
    for layer in prepared.graph.nodes:
        weight = None if layer in block else branched_weight(layer)
        if weight is None or layer.args[1] is weight or _is_observed_over_time(layer, prepared):
            continue
        rank = layers.config_of(layer).low_rank
        values: Tensor = read_attribute(prepared, str(weight.target))
        if rank is not None and (rank := branch_rank(values, rank)):
            factors[str(weight.target)] = low_rank_factors(values, rank)

    def make_observer(layer: fx.Node) -> nn.Module:
        return _observer(layer_name(layer))

    PropagateValues()(prepared)  # torchao's own observers have none
    AddLowRankBranches(factors, make_observer)(prepared)
    return len(factors)
