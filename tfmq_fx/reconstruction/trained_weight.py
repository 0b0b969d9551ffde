r"""A weight that is trained with gradients that pass its rounding as if it were not there; its integers are kept.

Training starts where every weight rounds as it did before: from the value nearest to the float one that rounds so.
What is trained on top is either an adapter of low rank, :math:`Q(W + s B A)` with :math:`B = 0`, or the whole weight
and the scales of its channels, :math:`Q_{s e^l}(W + s D)` with :math:`D = 0, l = 0`. Both are measured in scales, so
that one learning rate fits every layer.

Sources: EfficientDM (He et al., ICLR 2024), section 3.2, for adapters (there scales that differ between layers are what
its scale-aware optimization is for); LSQ (Esser et al., ICLR 2020) for scales.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from types import TracebackType

import torch
from torch import Tensor, nn

from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.fake_quantizers.straight_through import quantize_straight_through

__all__ = ["AdaptedWeight", "TrainedWeight", "WholeWeight"]

#: How far from its grid point a weight starts at most, in steps: just short of where it would round to the next.
START = 0.49


class TrainedWeight(ABC):
    """A context manager, behind which the quantizer has the integers, and the scales, that were learned.

    Args:
        quantizer: Of the weight, which has seen it; what it rounds to now is where training starts.

    Attributes:
        variables: What changes the weight, trained at one rate.
        log_scale: The logarithm of the change of the scales, ``[C, 1]``; None where scales stay.
    """

    log_scale: nn.Parameter | None = None

    def __init__(self, quantizer: AdaRoundQuantizer) -> None:
        self.quantizer = quantizer
        self.scale, self.zero_point = quantizer.scale[:, None].clone(), quantizer.zero_point[:, None]
        self.shape = quantizer.up.movedim(quantizer.axis, 0).shape
        self.dtype = quantizer.seen_weight().dtype
        weight, rounded = (self._channels(w) for w in (quantizer.seen_weight(), quantizer.dequantized()))
        reach = START * self.scale
        self.start = torch.minimum(torch.maximum(weight, rounded - reach), rounded + reach)
        self.variables: list[nn.Parameter] = []

    def _channels(self, weight: Tensor) -> Tensor:
        return weight.detach().to(torch.float32).movedim(self.quantizer.axis, 0).flatten(1)

    def _weight(self, channels: Tensor) -> Tensor:
        return channels.reshape(self.shape).movedim(0, self.quantizer.axis)

    @abstractmethod
    def change(self) -> Tensor:
        """How far the weight is from where it started, in scales, ``[C, n]``."""

    def latent(self) -> Tensor:
        """The weight before it is rounded, ``[C, n]``."""
        return self.start + self.scale * self.change()

    def scale_now(self) -> Tensor:
        """The scales, ``[C, 1]``."""
        return self.scale if self.log_scale is None else self.scale * self.log_scale.exp()

    def soft(self) -> Tensor:
        """The rounded weight, in its own shape and dtype; its gradient goes to what is trained."""
        quantized = quantize_straight_through(self.latent(), self.scale_now(), self.zero_point, *self.quantizer.bounds)
        return self._weight(quantized).to(self.dtype)

    def __enter__(self) -> TrainedWeight:
        """Nothing is changed before the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Without an error, keep the integers and the scales."""
        if error is None:
            with torch.no_grad():
                low, high = self.quantizer.bounds
                scale = self.scale_now()
                integers = ((self.latent() * scale.reciprocal()).round() + self.zero_point).clamp(low, high)
                self.quantizer.scale = scale[:, 0].clone()
                self.quantizer.put(self._weight(integers - self.zero_point))


class AdaptedWeight(TrainedWeight):
    """``Q(W + s B A)``.

    Args:
        quantizer: As for :class:`TrainedWeight`.
        rank: Of the adapter; at most that of the weight.
        generator: Draws ``A``.

    Attributes:
        down: ``A``, ``[r, n]``.
        up: ``B``, ``[C, r]``.
    """

    def __init__(self, quantizer: AdaRoundQuantizer, rank: int, generator: torch.Generator) -> None:
        super().__init__(quantizer)
        rank = min(rank, *self.start.shape)
        self.down = nn.Parameter(torch.randn(rank, self.start.shape[1], generator=generator) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(self.start.shape[0], rank))
        self.variables = [self.down, self.up]

    def change(self) -> Tensor:
        """``B A``."""
        return self.up @ self.down


class WholeWeight(TrainedWeight):
    """``Q(W + s D)`` with scales ``s e^l``: every value of the weight and every scale is trained.

    Args:
        quantizer: As for :class:`TrainedWeight`.
    """

    def __init__(self, quantizer: AdaRoundQuantizer) -> None:
        super().__init__(quantizer)
        self.moved = nn.Parameter(torch.zeros_like(self.start))
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        self.variables = [self.moved]

    def change(self) -> Tensor:
        """``D``."""
        return self.moved
