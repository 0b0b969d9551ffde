"""Fake quantizer of an activation inside the temporal block: one parameter set per timestep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfmq_fx.fake_quantizers.straight_through import drop_quantization, fake_quantize_fixed, quantize_straight_through
from tfmq_fx.observers import TimestepObserver
from tfmq_fx.observers.ranges import asymmetric_parameters

__all__ = ["TimestepQuantizer"]


class TimestepQuantizer(TimestepObserver):
    """Quantizes each item with the parameters of its timestep (FSC); called as ``quantizer(x, rows)``.

    Args:
        observer: The calibrated observer that it replaces.

    Attributes:
        enabled: Off, the activation passes through.
        observing: On, the rows seen take the range of what is seen now, and that alone; a row that is seen several
            times, under several conditionings, takes the union.
        drop: Probability that an element is left unquantized (training only).
        log_step: While step sizes are learned, the logarithm of the change of each row's, ``[K]``; else None.
    """

    def __init__(self, observer: TimestepObserver) -> None:
        super().__init__(len(observer.seen), observer.quant_max.bit_length(), observer.subject)
        low, high = observer.observed_ranges()
        self.low.copy_(low)
        self.high.copy_(high)
        self.seen.fill_(True)
        self.enabled = True
        self.observing = False
        self.drop = 0.0
        self.log_step: nn.Parameter | None = None

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Quantize and dequantize ``x`` (``[N, ...]``, float) with the parameters of its table rows (``[N]``)."""
        if not self.enabled:
            return x
        if self.observing:
            low, high = self.ranges_of(x, rows)
            # Zero belongs to every range, as for the observer, whose tables start at zero.
            self.low[rows] = torch.zeros_like(self.low).scatter_reduce(0, rows, low, "amin")[rows]
            self.high[rows] = torch.zeros_like(self.high).scatter_reduce(0, rows, high, "amax")[rows]
            self.seen[rows] = True
        scale, zero = asymmetric_parameters(self.low[rows], self.high[rows], self.quant_min, self.quant_max)
        shape = [-1] + [1] * (x.ndim - 1)
        quantize = fake_quantize_fixed
        if self.log_step is not None:
            scale, quantize = scale * self.log_step[rows].exp(), quantize_straight_through
        quantized = quantize(x, scale.reshape(shape), zero.reshape(shape), self.quant_min, self.quant_max)
        return drop_quantization(quantized, x, self.drop)

    def learn_step(self) -> nn.Parameter:
        """Start learning the step sizes; returns what to train."""
        self.log_step = nn.Parameter(torch.zeros_like(self.low))
        return self.log_step

    @torch.no_grad()
    def keep_step(self) -> None:
        """Stop learning the step sizes and keep them: scaling a range scales its step and keeps its zero point."""
        if self.log_step is not None:
            self.low *= self.log_step.exp()
            self.high *= self.log_step.exp()
            self.log_step = None
