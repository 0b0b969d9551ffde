"""Observers of activations: one scale and zero point per tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import CalibrationError
from tfmq_fx.observers.contract import CheckedObserver
from tfmq_fx.observers.finite import input_of, require_finite
from tfmq_fx.observers.ranges import (
    asymmetric_parameters,
    centred_parameters,
    ordinary_size,
    search_asymmetric,
    search_symmetric,
)
from tfmq_fx.observers.timestep_ranges import TimestepRanges, smoothed

__all__ = ["EMAMinMaxObserver", "MSEObserver", "MinMaxObserver", "PerTensorObserver", "per_tensor_parameters"]

#: Smoothing of the running minimum and maximum (TFMQ-DM's activations outside the temporal block).
MOMENTUM = 0.95
#: Bins of the histogram that the search runs on: eight to a level at 8 bits.
HISTOGRAM_BINS = 2048


def per_tensor_parameters(
    low: Tensor, high: Tensor, q_min: int, q_max: int, qscheme: torch.qscheme
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range: asymmetric, or with the zero point in the middle.

    Args:
        low: Lower ends, any shape, float.
        high: Upper ends, same shape.
        q_min: Smallest integer.
        q_max: Largest integer.
        qscheme: ``torch.per_tensor_affine`` or ``torch.per_tensor_symmetric``.
    """
    parameters = centred_parameters if qscheme == torch.per_tensor_symmetric else asymmetric_parameters
    return parameters(low, high, q_min, q_max)


class PerTensorObserver(CheckedObserver):
    """The base of observers with one range per tensor: the attributes that PT2E reads, and the step to parameters.

    A subclass implements ``forward``, which takes in a tensor by way of :meth:`range_of` and returns it, and
    :meth:`observed_range`. They refuse NaN and infinite values (:class:`~tfmq_fx.errors.NonFiniteError`) before they
    take anything in.

    Args:
        dtype: Integer dtype.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        qscheme: Per-tensor, affine or symmetric.
        subject: What the activation is called in errors.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        subject: str = input_of(""),
        **_: Any,
    ) -> None:
        super().__init__(dtype)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.subject = subject

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of ``x``, 0-dim, float32."""
        low, high = (end.to(torch.float32) for end in torch.aminmax(x))
        require_finite(low, high, x, self.subject)
        return low, high

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """The range ``(lo, hi)``, each of shape ``[1]``."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), each ``[1]``.

        Raises:
            CalibrationError: Nothing was observed, or the observer's range is none.
        """
        low, high = self.checked_ends(self.observed_range(), 1)
        self.require_ranges(low, high)
        return per_tensor_parameters(low, high, self.quant_min, self.quant_max, self.qscheme)


def _nothing_observed() -> CalibrationError:
    return CalibrationError("an activation was never observed; calibrate with at least one batch before converting")


class MinMaxObserver(PerTensorObserver):
    """Minimum and maximum of everything observed."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.register_buffer("low", torch.full((1,), torch.inf))
        self.register_buffer("high", torch.full((1,), -torch.inf))
        self.low: Tensor
        self.high: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` (any shape, float) and return it."""
        if x.numel():
            low, high = self.range_of(x.detach())
            self.low = torch.minimum(self.low, low)
            self.high = torch.maximum(self.high, high)
        return x

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """The union of all ranges."""
        if bool(self.low > self.high):
            raise _nothing_observed()
        return self.low, self.high


class EMAMinMaxObserver(PerTensorObserver):
    """Minimum and maximum, smoothed over batches and corrected for the start from zero.

    ``lo <- m lo + (1 - m) min(x)`` from 0, likewise ``hi``; read as ``lo / (1 - m^k)`` after ``k``
    batches, so that no batch weighs more for being the first. Source: TFMQ-DM (CVPR 2024), section 6;
    the correction is that of Adam (Kingma & Ba, 2015, section 3).

    In :func:`tfmq_fx.calibrate` a timestep stands for a batch: its range is that of all its items, so that the result
    does not depend on how they were cut into batches. Timesteps of few items are taken together with their neighbours.
    """

    def __init__(self, momentum: float = MOMENTUM, **spec: Any) -> None:
        super().__init__(**spec)
        self.momentum, self.ranges = momentum, TimestepRanges()
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.zeros(1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.low: Tensor
        self.high: Tensor
        self.batches: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` (any shape, float) and return it."""
        if x.numel():
            low, high = self.range_of(x.detach())
            if self.ranges.items is not None:
                self.ranges.add(low, high)
            else:
                self.low, self.high = self._step((self.low, self.high), (low, high))
                self.batches += 1
        return x

    def _step(self, ends: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = (smoothed(value, other, self.momentum) for value, other in zip(ends, new, strict=True))
        return low, high

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """The corrected running range."""
        ends, count = (self.low, self.high), int(self.batches)
        for new in self.ranges.by_bucket():
            ends, count = self._step(ends, new), count + 1
        if count == 0:
            raise _nothing_observed()
        correction = 1 - self.momentum**count
        return ends[0] / correction, ends[1] / correction


class MSEObserver(PerTensorObserver):
    """The range that quantizes the observed values best in the 2.4 norm.

    Keeps a histogram over the exact minimum and maximum; the search over 80 shrunk ranges weighs each
    bin's centre by its count, so that no outlier is missed. Re-binning when the range grows moves a
    count by at most one bin.
    """

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.zeros(1))
        self.register_buffer("counts", torch.zeros(HISTOGRAM_BINS, dtype=torch.float64))
        self.low: Tensor
        self.high: Tensor
        self.counts: Tensor

    def _centres(self) -> Tensor:
        # In float64, because the width of float32's own range is infinite in float32.
        low, high = self.low.double(), self.high.double()
        steps = torch.arange(HISTOGRAM_BINS, device=low.device, dtype=torch.float64) + 0.5
        return low + (high - low) / HISTOGRAM_BINS * steps

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` (any shape, float) and return it."""
        if x.numel():
            low, high = self.range_of(x.detach())
            flat = x.detach().reshape(-1).to(torch.float32)
            self._grow(torch.minimum(self.low, low), torch.maximum(self.high, high))
            if bool(self.high > self.low):
                # torch multiplies by the number of bins before it divides by the width.
                factor = ordinary_size(self.low, self.high)
                low, high = self.low * factor, self.high * factor
                self.counts += torch.histc(flat * factor, HISTOGRAM_BINS, low.item(), high.item())
            else:
                self.counts[0] += flat.numel()
        return x

    def _grow(self, low: Tensor, high: Tensor) -> None:
        """Widen the histogram to ``[low, high]``, moving the old counts to the new bins."""
        if bool(low < self.low) or bool(high > self.high):
            width = high.double() - low.double()
            bins = ((self._centres() - low) / width * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
            self.counts = torch.zeros_like(self.counts).index_add_(0, bins, self.counts)
            self.low, self.high = low, high

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """The best shrink of the observed range."""
        if not bool(self.counts.any()):
            raise _nothing_observed()
        values, weights = self._centres().to(torch.float32)[None], self.counts.to(torch.float32)[None]
        if self.qscheme == torch.per_tensor_symmetric:
            # Shifted by the fixed zero point, the grid is the signed one.
            middle = (self.quant_min + self.quant_max + 1) // 2
            lowest, highest = self.quant_min - middle, self.quant_max - middle
            return search_symmetric(values, self.low, self.high, lowest, highest, weights=weights)
        return search_asymmetric(values, self.low, self.high, self.quant_min, self.quant_max, weights=weights)
