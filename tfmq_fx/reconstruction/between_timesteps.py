"""Timesteps between those of a schedule: they get rows of their own when they are asked for, with the same weights.

Weights that are rounded for the schedule alone are free where its timesteps do not look, and a temporal block that has
more columns than timesteps leaves much unseen: features in between, which no reconstruction has met, turn towards their
neighbours. Their float inputs cost nothing and hold the weights in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tfmq_fx.passes.analysis import evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.reconstruction.layer_inputs import input_position
from tfmq_fx.temporal.domain import TemporalDomain, finite_domain

__all__ = ["moments_between", "timesteps_between"]

#: Where they lie between two neighbours.
SHARES = (0.25, 0.5, 0.75)
#: What they weigh together, relative to the schedule. Of 0.3, 1 and 3, 0.3 leaves 0.6 % of all features taken for those
#: of another timestep on one of two models; 3 gains nothing more.
WEIGHT = 1.0


def timesteps_between(timesteps: Tensor) -> Tensor:
    """Timesteps between those of a schedule, float64; integers between integers. None beyond its ends."""
    ordered = timesteps.double().sort().values
    shares = torch.tensor(SHARES, dtype=torch.float64)
    between = (ordered[:-1, None] + ordered.diff()[:, None] * shares).reshape(-1)
    if bool((ordered == ordered.round()).all()):
        between = between.round()
    return torch.tensor(sorted({*between.tolist()}.difference(ordered.tolist())), dtype=torch.float64)


def moments_between(model: fx.GraphModule, layers: Sequence[fx.Node], domain: TemporalDomain) -> dict[fx.Node, Tensor]:
    """``X^T X`` of what linears of the temporal block see between the timesteps of a schedule.

    Args:
        model: The float graph (:func:`~.float_graph.float_graph`).
        layers: Nodes of a graph with the same names.
        domain: What the block is reconstructed over.

    Returns:
        Per layer, float64 ``[n, n]``: as if there were :data:`WEIGHT` as many entries as in the domain.
    """
    members = find_temporal_block(model, domain.timestep, finite=domain.further).nodes
    named = {node.name: node for node in members}
    sources = [argument_node(named[layer.name], input_position(layer)) for layer in layers]
    between = timesteps_between(domain.values[domain.timestep])
    if len(between) == 0:
        between = domain.values[domain.timestep]
    others = finite_domain(domain.timestep, {**domain.values, domain.timestep: between})
    columns = others.sampled(len(domain) * (len(SHARES) + 1), 0).columns()
    moments = {}
    for layer, values in zip(layers, evaluate_temporal_nodes(model, members, sources, columns), strict=True):
        inputs = values.flatten(0, -2).double()
        moments[layer] = inputs.T @ inputs * (WEIGHT * len(domain) / len(inputs))
    return moments
