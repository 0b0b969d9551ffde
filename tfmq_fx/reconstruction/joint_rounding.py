r"""Round layers together by what the model's result does with their errors.

With :math:`e(t)` the errors of the outputs of several layers at entry :math:`t`, all in one vector, the result moves by
:math:`J(t)\,e(t)`. The expectation of its square is :math:`e(t)^T M(t)\,e(t)`, :math:`M = E[J^T J]`, of which probes
:math:`g_k = J^T v_k`, :math:`v_k \sim N(0, I)`, are a sketch: :math:`M \approx \frac1K \sum_k g_k g_k^T`. It has the
direction of the error and how errors of different layers add up or cancel. Few probes leave most directions unseen, so
part of the sketch is replaced by its diagonal:

.. math::
    \sum_t \Bigl[(1 - \rho) \sum_k (g_k(t)^T e(t))^2 + \rho \sum_c \textstyle\sum_k g_{kc}(t)^2\, e_c(t)^2\Bigr]
    + \sum_c d_c\, \Delta w_c R\, \Delta w_c^T

``R`` keeps a weight from moving where the entries do not see it (:attr:`JointLayer.prior`). In one output channel's
integers this is quadratic: a chunk of channels at a time is put to the nearest plane (:mod:`.gptq`) of its minimum, the
others held, and each channel keeps its new integers where the sum falls.

Sources: the sketch is Hutchinson's estimator of a Gauss-Newton matrix; its use for rounding the temporal block is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq_fx.reconstruction.gptq import nearest_plane

__all__ = ["JointLayer", "round_alone", "round_together"]

#: What of the sketch is replaced by its diagonal.
SHRINKAGE = 0.5
#: Output channels that are proposed integers at once.
CHANNELS = 16


@dataclass(eq=False)
class JointLayer:
    """A linear layer among those that are rounded together; everything float64.

    Attributes:
        weight: Float weight, ``[C, n]``.
        scale: Of each output channel, ``[C, 1]``.
        low: Smallest integer of each channel, counted from its zero point, ``[C, 1]``.
        high: Largest.
        inputs: What the quantized layer sees at each entry, ``[N, n]``.
        target: Float output without bias, ``[N, C]``.
        probes: Of each entry, ``[N, K, C]``.
        prior: ``R``, ``[n, n]``, in units of ``inputs^T inputs``.
        integers: The choice, counted from the zero point, ``[C, n]``; rounded to nearest at the start.
    """

    weight: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    inputs: Tensor
    target: Tensor
    probes: Tensor
    prior: Tensor
    integers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Round to nearest."""
        self.integers = (self.weight / self.scale).round().clamp(self.low, self.high)

    def error(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Of the outputs of some channels, ``[N, r]``."""
        return self.inputs @ (self.integers[rows] * self.scale[rows]).T - self.target[:, rows]

    def moved(self, channels: slice | Tensor = slice(None)) -> Tensor:
        """How far the weights of some channels are from the float ones, ``[r, n]``."""
        return self.integers[channels] * self.scale[channels] - self.weight[channels]


def _factor(layer: JointLayer, felt: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns and the Cholesky factor of the curvature that the channels of a layer share.

    Args:
        layer: The layer.
        felt: How much each entry weighs, of mean 1, ``[N]``.
    """
    curvature = (layer.inputs * felt[:, None]).T @ layer.inputs + layer.prior
    order = curvature.diagonal().argsort(stable=True)
    return order, torch.linalg.cholesky(curvature[order][:, order])


def _proposed(layer: JointLayer, channels: Tensor, slope: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Integers near the minimum of a quadratic with a slope ``[r, n]`` at the float weight."""
    target = layer.weight[channels][:, order] - torch.cholesky_solve(slope[:, order].T, factor).T
    target = target / layer.scale[channels]
    chosen = nearest_plane(target[None], factor[None], layer.low[None, channels], layer.high[None, channels])[0]
    return torch.empty_like(chosen).scatter_(1, order.expand_as(chosen), chosen)


@torch.no_grad()
def round_alone(layer: JointLayer) -> None:
    """Round a layer by the plain squared error of its own outputs, channel by channel where that error falls."""
    channels = torch.arange(len(layer.weight))
    order, factor = _factor(layer, torch.ones(len(layer.inputs), dtype=layer.inputs.dtype))
    slope = (layer.inputs @ layer.weight.T - layer.target).T @ layer.inputs
    before, held = _alone(layer), layer.integers
    layer.integers = _proposed(layer, channels, slope, order, factor)
    layer.integers = torch.where((_alone(layer) < before)[:, None], layer.integers, held)


def _alone(layer: JointLayer) -> Tensor:
    moved = layer.moved()
    return layer.error().square().sum(0) + ((moved @ layer.prior) * moved).sum(1)


@torch.no_grad()
def round_together(layers: Sequence[JointLayer], sweeps: int, generator: torch.Generator) -> float:
    """Go over all channels of all layers in random order, several times.

    Args:
        layers: The layers, whose outputs together are what the probes are of; updated in place.
        sweeps: How many times.
        generator: Draws the order.

    Returns:
        What the sketch says of the error of the result, ``sum_t sum_k (g_k(t)^T e(t))^2``.
    """
    sums = torch.stack([torch.einsum("tkc,tc->tk", x.probes, x.error()) for x in layers]).sum(0)
    diagonals = [x.probes.square().sum(1) for x in layers]
    factors = []
    for layer, diagonal in zip(layers, diagonals, strict=True):
        felt = diagonal.sum(1)
        total = felt.mean()
        factors.append(_factor(layer, felt / total if total > 0 else torch.ones_like(felt)))
    for _ in range(sweeps):
        chunks = [
            (index, channels)
            for index, layer in enumerate(layers)
            for channels in torch.split(torch.randperm(len(layer.weight), generator=generator), CHANNELS)
        ]
        for place in torch.randperm(len(chunks), generator=generator).tolist():
            index, channels = chunks[place]
            sums = _improve(layers[index], channels, sums, diagonals[index][:, channels], *factors[index])
    return sums.square().sum().item()


def _improve(
    layer: JointLayer, channels: Tensor, sums: Tensor, diagonal: Tensor, order: Tensor, factor: Tensor
) -> Tensor:
    """Give a chunk of channels better integers, one of them after the other; returns the sums ``[N, K]`` after it."""
    inputs, probes = layer.inputs, layer.probes[:, :, channels]
    mean = diagonal.mean(0)
    error = layer.error(channels)
    # The slope at the float weight, all other channels as they are: d (x w - target) + (1 - rho) g (sum of others).
    others = torch.einsum("tkr,tk->tr", probes, sums) - diagonal * error
    at_float = diagonal * (inputs @ layer.weight[channels].T - layer.target[:, channels])
    slope = (at_float + (1 - SHRINKAGE) * others).T @ inputs / torch.where(mean > 0, mean, 1.0)[:, None]
    proposed = _proposed(layer, channels, slope, order, factor)
    held, moved = layer.integers[channels], layer.moved(channels)
    layer.integers[channels] = proposed
    change, anew = layer.error(channels) - error, layer.moved(channels)
    prior = ((anew @ layer.prior) * anew - (moved @ layer.prior) * moved).sum(1) * mean
    own = (diagonal * change * (2 * error + change)).sum(0)
    for position in range(len(channels)):
        step = probes[:, :, position] * change[:, position, None]
        together = (step * (2 * sums + step)).sum()
        if (1 - SHRINKAGE) * together + SHRINKAGE * own[position] + prior[position] < 0:
            sums = sums + step
        else:
            layer.integers[channels[position]] = held[position]
    return sums
