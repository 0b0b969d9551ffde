"""Observers that keep parameters chosen before: what they see is held against the kept ranges, and may widen them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.observers.activation import PerTensorObserver, per_tensor_parameters
from tfmq_fx.observers.finite import input_of
from tfmq_fx.observers.grouped import GroupedObserver
from tfmq_fx.observers.ranges import fake_quantize
from tfmq_fx.observers.temporal import ConditionalObserver

__all__ = ["KeptConditionalObserver", "KeptGroupedObserver", "KeptObserver", "KeptParameters", "ends_of"]


def ends_of(scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """The range that parameters stand for, float32 in the shape of ``scale``; around zero, which is in every range.

    A scale of 1 at a zero point of ``q_min`` is what a range of zero width has, an activation that was never anything
    but 0 (:func:`~tfmq_fx.observers.ranges.asymmetric_parameters`): its ends are 0.
    """
    low, high = (q_min - zero_point) * scale, (q_max - zero_point) * scale
    empty = (scale == 1.0) & (zero_point == q_min)
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


class KeptParameters:
    """What the three observers share; a subclass is an observer too, and gives :meth:`seen_ranges`.

    Attributes:
        scale: Float32 ``[R]``, for one range, or for a row or group each.
        zero_point: Int64 ``[R]``.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    subject: str
    qscheme: torch.qscheme

    def keep(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take these parameters, to the bit."""
        module: Any = self
        module.register_buffer("scale", scale.detach().clone().reshape(-1).to(torch.float32))
        module.register_buffer("zero_point", zero_point.detach().clone().reshape(-1).to(torch.int64))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The kept parameters, or those of the widened ranges: scales (float32) and zero points (int64), ``[R]``."""
        return self.scale, self.zero_point

    def kept_ranges(self) -> tuple[Tensor, Tensor]:
        """The ranges ``(low, high)`` that the parameters stand for, float32 ``[R]`` each."""
        return ends_of(self.scale, self.zero_point, self.quant_min, self.quant_max)

    def seen_ranges(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each row, ``[R]``; infinite, ``low > high``, where nothing was seen."""
        raise NotImplementedError

    def widen(self, low: Tensor, high: Tensor, rows: Tensor) -> None:
        """Take the parameters of these ranges in some rows.

        Args:
            low: ``[R]``.
            high: ``[R]``.
            rows: Which rows, bool ``[R]``; the others keep theirs to the bit.
        """
        scale, zero_point = per_tensor_parameters(low, high, self.quant_min, self.quant_max, self.qscheme)
        self.scale = torch.where(rows, scale, self.scale)
        self.zero_point = torch.where(rows, zero_point, self.zero_point)


class KeptObserver(KeptParameters, PerTensorObserver):
    """Keeps one range.

    Args:
        scale: ``[1]``.
        zero_point: ``[1]``.
        **spec: As :class:`~tfmq_fx.observers.PerTensorObserver`.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, **spec: Any) -> None:
        PerTensorObserver.__init__(self, **spec)
        self.keep(scale, zero_point)
        self.register_buffer("low", torch.full((1,), torch.inf))
        self.register_buffer("high", torch.full((1,), -torch.inf))
        self.low: Tensor
        self.high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """See ``x`` (any shape, float) and return it."""
        if x.numel():
            low, high = self.range_of(x.detach())
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        return x

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """The kept range."""
        return self.kept_ranges()

    def seen_ranges(self) -> tuple[Tensor, Tensor]:
        """As :meth:`KeptParameters.seen_ranges`."""
        return self.low, self.high


class KeptGroupedObserver(KeptParameters, GroupedObserver):
    """Keeps a range per group of timesteps.

    Args:
        scale: ``[G]``.
        zero_point: ``[G]``.
        bits: Width, 2 to 8 or 16.
        subject: What the activation is called in errors.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int, subject: str = input_of("")) -> None:
        GroupedObserver.__init__(self, len(scale), bits, subject)
        self.keep(scale, zero_point)
        self.low, self.high = torch.full((len(scale),), torch.inf), torch.full((len(scale),), -torch.inf)

    def observe(self, values: Tensor, groups: Tensor, present: Tensor, low: Tensor, high: Tensor) -> None:
        """Merge what is seen."""
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The kept ranges."""
        return self.kept_ranges()

    def seen_ranges(self) -> tuple[Tensor, Tensor]:
        """As :meth:`KeptParameters.seen_ranges`."""
        return self.low, self.high


class KeptConditionalObserver(KeptParameters, ConditionalObserver):
    """Keeps a range per timestep where the timestep and the conditioning alone decide; arguments as above."""

    qscheme = torch.per_tensor_affine

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int, subject: str = input_of("")) -> None:
        ConditionalObserver.__init__(self, len(scale), bits, subject)
        self.keep(scale, zero_point)

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The kept ranges."""
        return self.kept_ranges()

    def seen_ranges(self) -> tuple[Tensor, Tensor]:
        """As :meth:`KeptParameters.seen_ranges`."""
        return self.low.masked_fill(~self.seen, torch.inf), self.high.masked_fill(~self.seen, -torch.inf)

    def fake_quantize(self, x: Tensor, rows: Tensor) -> Tensor:
        """Quantize and dequantize ``x`` (``[N, ...]``) with the kept parameters of its items' rows (``[N]``)."""
        shape = [-1] + [1] * (x.ndim - 1)
        scale, zero_point = self.scale[rows].reshape(shape), self.zero_point[rows].reshape(shape)
        return fake_quantize(x, scale, zero_point, self.quant_min, self.quant_max)
