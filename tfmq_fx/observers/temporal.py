"""Observers of activations that the sample does not reach: one parameter set per timestep."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.errors import CalibrationError
from tfmq_fx.observers.finite import input_of, require_finite
from tfmq_fx.observers.gathered import convert_gathered
from tfmq_fx.observers.grouped import nearest_seen
from tfmq_fx.observers.ranges import asymmetric_parameters, fake_quantize

__all__ = ["ConditionalObserver", "TimestepObserver"]


class TimestepObserver(ObserverBase):  # type: ignore[misc]  # torchao has no types
    """Minimum and maximum per row of the timestep table, called as ``observer(x, rows)``.

    Finite set calibration (FSC, TFMQ-DM, CVPR 2024, section 5): inside the temporal block the
    activations form a finite set, one per timestep, so each timestep gets its own min-max parameters
    ``{(s_1, z_1), …, (s_T, z_T)}``.

    Args:
        rows: Number of rows ``K`` of the table: its timesteps, times the values of further finite inputs.
        bits: Width, 2 to 8 or 16.
        subject: What the activation is called in errors.
    """

    def __init__(self, rows: int, bits: int, subject: str = input_of("")) -> None:
        super().__init__(torch.uint8 if bits <= 8 else torch.int32)
        self.subject = subject
        self.quant_min, self.quant_max = 0, 2**bits - 1
        self.register_buffer("low", torch.zeros(rows))
        self.register_buffer("high", torch.zeros(rows))
        self.register_buffer("seen", torch.zeros(rows, dtype=torch.bool))
        self.low: Tensor
        self.high: Tensor
        self.seen: Tensor

    def reset(self) -> None:
        """Forget everything observed."""
        self.low.zero_()
        self.high.zero_()
        self.seen.zero_()

    def ranges_of(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each item of ``x``, ``[N]``, float32.

        Raises:
            NonFiniteError: One is NaN or infinite.
        """
        low, high = x.detach().to(torch.float32).flatten(1).aminmax(dim=1)
        require_finite(low, high, x, self.subject, rows)
        return low, high

    def observe(self, x: Tensor, rows: Tensor) -> None:
        """Take in ``x`` (shape ``[N, ...]``, float) under the rows of its items (int64, ``[N]``).

        The order of batches does not matter: minima and maxima are merged.
        """
        low, high = self.ranges_of(x, rows)
        self.low.scatter_reduce_(0, rows, low, "amin")
        self.high.scatter_reduce_(0, rows, high, "amax")
        self.seen[rows] = True

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """:meth:`observe` and return ``x``."""
        self.observe(x, rows)
        return x

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The ranges ``(lo, hi)``, each ``[K]``.

        Raises:
            CalibrationError: A timestep of the table was never observed.
        """
        if not bool(self.seen.all()):
            missing = int((~self.seen).sum())
            msg = (
                f"{missing} of {len(self.seen)} timesteps were never observed; run tfmq_fx.calibrate before converting"
            )
            raise CalibrationError(msg)
        return self.low, self.high

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points (int64), each ``[K]``; raises as :meth:`observed_ranges`."""
        return asymmetric_parameters(*self.observed_ranges(), self.quant_min, self.quant_max)

    def fake_quantize(self, x: Tensor, rows: Tensor) -> Tensor:
        """Quantize and dequantize ``x`` (``[N, ...]``) with the parameters of its items' rows (``[N]``)."""
        scale, zero = asymmetric_parameters(self.low[rows], self.high[rows], self.quant_min, self.quant_max)
        shape = [-1] + [1] * (x.ndim - 1)
        return fake_quantize(x, scale.reshape(shape), zero.reshape(shape), self.quant_min, self.quant_max)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replace ``node`` by quantize and dequantize with gathered parameters (called by ``convert_pt2e``)."""
        convert_gathered(self, model, node)


class ConditionalObserver(TimestepObserver):
    """Minimum and maximum per timestep over all conditionings that it is shown, called as ``observer(x, rows)``.

    The conditionings are no finite set, as timesteps are: those of the calibration batches stand for them. A row is
    the number of a timestep in the order of noise. The rest is as :class:`TimestepObserver`.
    """

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The ranges ``(lo, hi)``, each ``[K]``; a timestep without observations takes those of the nearest.

        Raises:
            CalibrationError: Nothing was observed.
        """
        if not bool(self.seen.any()):
            msg = "an activation was never observed; calibrate with at least one batch before converting"
            raise CalibrationError(msg)
        nearest = nearest_seen(self.seen)
        return self.low[nearest], self.high[nearest]
