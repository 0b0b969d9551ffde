"""Channels that do not share a range: which activations to scale channel by channel, and by how much.

An activation has one range for all channels. Where a few channels are far larger than the others, as in a residual
stream, the others get few of its steps. Dividing channels by factors and multiplying the weights by them changes
nothing in float but rounding, and shares the range out; but the weights' own ranges grow. So the factors are those that
leave the least rounding noise in the layer's output, activations and weights together, in the mean over timesteps. The
noise is computed from what calibration saw of each channel; no layer is run for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.observers import GroupedEMAObserver, GroupedMinMaxObserver, GroupedObserver
from tfmq_fx.observers.channel_statistics import ChannelStatistics
from tfmq_fx.passes import ScaleChannels
from tfmq_fx.passes.quantized.scale_channels import channel_axis, scalable_weights
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["equalize_channels", "factors_of", "watch_channels"]

#: The noise in a layer's output falls to this part at least, or nothing is changed.
WORTH = 0.9
#: Shares of the activation's range in the factors that are tried (SmoothQuant's migration strength).
STRENGTHS = tuple(step / 10 for step in range(2, 11))


def watch_channels(prepared: fx.GraphModule) -> None:
    """Let the observers of activations that could be scaled see what each channel spans."""
    for node, observer in _observers(prepared):
        layer = next(iter(node.users), None)
        if layer is not None and scalable_weights(node):
            axis = channel_axis(layer)
            observer.channels = ChannelStatistics(len(observer.low), int(node_value(node).shape[axis]), axis)


def equalize_channels(prepared: fx.GraphModule, weight_bits: int) -> int:
    """Scale the channels of a calibrated graph where that leaves less noise; the float function stays what it is.

    What was watched is forgotten: calibrating further changes ranges and no factors.

    Args:
        prepared: The graph, changed in place.
        weight_bits: Width of the weights.

    Returns:
        How many activations were scaled.
    """
    factors: dict[str, Tensor] = {}
    for node, observer in _observers(prepared):
        statistics, observer.channels = observer.channels, None
        weights = scalable_weights(node)
        if statistics is None or not weights or not bool(statistics.values.any()):
            continue
        values: list[Tensor] = [read_attribute(prepared, str(weight.target)).detach() for weight in weights]
        levels = observer.quant_max - observer.quant_min
        chosen = factors_of(statistics, torch.cat(_alike(values)), levels, 2**weight_bits - 1)
        if chosen is not None:
            factors[str(node.target)] = chosen
            prepared.set_submodule(str(node.target), _with_scaled_ranges(observer, statistics, chosen))
    ScaleChannels(factors)(prepared)
    return len(factors)


def factors_of(statistics: ChannelStatistics, weight: Tensor, levels: int, weight_levels: int) -> Tensor | None:
    """The factors that leave the least noise, float32 ``[C]``; None where none is worth it.

    Args:
        statistics: Of the activation.
        weight: Everything that reads it, ``[K, C, taps]``.
        levels: Steps of an activation's range.
        weight_levels: Steps of a weight's range.
    """
    seen = statistics.values > 0
    low, high = statistics.low[seen], statistics.high[seen]
    squares = (statistics.squares[seen] / statistics.values[seen, None]).float()
    weight = weight.float()
    reach = torch.maximum(-low, high).amax(0)
    used = (reach > 0) & (weight.abs().amax((0, 2)) > 0)
    if not bool(used.any()):
        return None

    def noise(factors: Tensor) -> float:
        spans = (high / factors).amax(1) - (low / factors).amin(1)
        gains = weight.square().sum((0, 2))
        of_activation = (spans / levels).square() * (factors.square() * gains).sum()
        steps = 2 * (weight * factors[None, :, None]).abs().amax((1, 2)) / weight_levels
        of_weights = steps.square().sum() * weight.shape[2] * (squares / factors.square()).sum(1)
        power = (squares * gains).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        return float(((of_activation + of_weights) / power).mean())

    best, least = None, WORTH * noise(torch.ones_like(reach))
    for strength in STRENGTHS:
        logarithm = torch.zeros_like(reach)
        size = weight.abs().amax((0, 2))
        logarithm[used] = strength * reach[used].log2() - (1 - strength) * size[used].log2()
        logarithm[used] -= logarithm[used].mean()
        factors = torch.exp2(logarithm.clamp(-24, 24))
        if (left := noise(factors)) < least:
            best, least = factors, left
    return best


def _with_scaled_ranges(observer: GroupedObserver, statistics: ChannelStatistics, factors: Tensor) -> GroupedObserver:
    """An observer of the scaled activation, which has seen what ``observer`` has."""
    rows = statistics.rows
    scaled = GroupedMinMaxObserver(len(observer.low), _bits(observer), observer.subject)
    scaled.pool_groups(observer.least_items, observer.entries_per_item)
    scaled.low, scaled.high = (statistics.low / factors).amin(1)[rows], (statistics.high / factors).amax(1)[rows]
    scaled.batches, scaled.items = observer.batches, observer.items
    return scaled


def _bits(observer: GroupedObserver) -> int:
    return int(observer.quant_max - observer.quant_min + 1).bit_length() - 1


def _observers(prepared: fx.GraphModule) -> list[tuple[fx.Node, Any]]:
    """The observers by timestep group whose ranges are extremes, and their nodes."""
    found = []
    for node in prepared.graph.find_nodes(op="call_module"):
        observer = prepared.get_submodule(str(node.target))
        if type(observer) in (GroupedEMAObserver, GroupedMinMaxObserver):
            found.append((node, observer))
    return found


def _alike(weights: list[Tensor]) -> list[Tensor]:
    """Weights of one number of taps, so that they are one matrix: those with fewer are filled up with zeros."""
    flat = [weight.flatten(2) if weight.ndim > 2 else weight[..., None] for weight in weights]
    taps = max(weight.shape[2] for weight in flat)
    return [torch.nn.functional.pad(weight, (0, taps - weight.shape[2])) for weight in flat]
