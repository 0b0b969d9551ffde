"""A weight's fake quantizer whose rounding can be chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq_fx.observers import PerChannelWeightObserver

__all__ = ["AdaRoundQuantizer"]


class AdaRoundQuantizer(PerChannelWeightObserver):
    """Quantizes a constant weight per channel, each value to a grid point that is chosen for it.

    Starts as rounding to nearest. :class:`tfmq_fx.reconstruction.rounding.RoundingTrainer` learns whether it is the
    point below or above; :func:`tfmq_fx.reconstruction.gptq.round_columns` takes any, and other scales where
    these leave less error. Zero points are those of the observer that it replaces, and stay.

    Args:
        observer: The observer that chose the range.
        weight: The weight, float, channels on ``observer.axis``.

    Attributes:
        enabled: Off, the weight passes through.
        soft: While training, the tensor that stands for the weight; None otherwise.
        up: How many grid points above ``floor(w / s)`` each weight is put, int8, the shape of the weight.
    """

    def __init__(self, observer: PerChannelWeightObserver, weight: Tensor) -> None:
        super().__init__(
            observer.bits, observer.symmetric, observer.search, observer.axis, observer.dtype, observer.subject
        )
        observer.forward(weight)
        scale, zero = observer.calculate_qparams()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero)
        self.register_buffer("up", torch.zeros_like(weight, dtype=torch.int8))
        self.scale: Tensor
        self.zero_point: Tensor
        self.up: Tensor
        self.enabled = True
        self.soft: Tensor | None = None
        self.weight = weight.detach()
        self.round_to_nearest()

    def _aligned(self, values: Tensor) -> Tensor:
        """One value per channel, shaped to broadcast against the weight."""
        return values.reshape([-1 if i == self.axis else 1 for i in range(self.up.ndim)])

    def ratio(self) -> Tensor:
        """``w / s``, float32, the shape of the weight."""
        return self.seen_weight().to(torch.float32) / self._aligned(self.scale)

    def round_to_nearest(self) -> None:
        """Choose the nearer grid point for every weight."""
        ratio = self.ratio()
        self.up = (ratio.round() - ratio.floor()).to(torch.int8)

    def put(self, levels: Tensor) -> None:
        """Choose grid points: multiples of the scale, integers counted from the zero point, the shape of the weight."""
        self.up = (levels - self.ratio().floor()).clamp(-128, 127).to(torch.int8)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points (int64), each ``[channels]``."""
        return self.scale, self.zero_point

    def forward(self, weight: Tensor) -> Tensor:
        """The soft weight while training, else the rounded one; ``weight`` itself when not enabled."""
        self.weight = weight.detach()
        if not self.enabled:
            return weight
        return self.dequantized().to(weight.dtype) if self.soft is None else self.soft

    def quantize(self) -> tuple[Tensor, Tensor]:
        """The integers (int8 with zero points folded, or int16) and the scales."""
        zero = self._aligned(self.zero_point)
        integers = (self.ratio().floor() + self.up + zero).clamp(*self.bounds).to(torch.int64)
        if self.bits == 16:
            return integers.to(torch.int16), self.scale
        return self.folded(integers, self.zero_point), self.scale
