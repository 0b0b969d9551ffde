r"""Fidelity: how far a quantized program's results are from the float model's, timestep by timestep.

.. math::

    e = \frac{\lVert q - f \rVert}{\lVert f \rVert}, \qquad
    PSNR = 20 \log_{10} \frac{\max |f|}{\sqrt{\lVert q - f \rVert^2 / n}} \text{ dB}

with the float results :math:`f` of the items at a timestep, :math:`n` numbers, and the quantized ones :math:`q`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Fidelity", "TimestepFidelity", "at_timestep", "relative"]


@dataclass(frozen=True)
class TimestepFidelity:
    """What quantizing changed at one timestep; the norms are float64, over all floating-point results flattened.

    Attributes:
        timestep: The timestep; None where the model has none, or an item that was measured has several.
        signal: The norm of the float results.
        difference: The norm of the difference; infinite where the quantized results are not finite.
        peak: The largest magnitude in the float results.
        numbers: How many numbers they are.
    """

    timestep: float | None
    signal: float
    difference: float
    peak: float
    numbers: int

    @classmethod
    def of(cls, timestep: float | None, results: Iterable[Tensor], expected: Iterable[Tensor]) -> TimestepFidelity:
        """Hold quantized ``results`` against the float ones, tensor by tensor; both of the same shapes."""
        signal = difference = peak = 0.0
        numbers = 0
        for actual, wanted in zip(results, expected, strict=True):
            exact = wanted.double()
            signal = math.hypot(signal, float(exact.norm()))
            difference = math.hypot(difference, float((actual.double() - exact).norm()))
            peak = max(peak, float(exact.abs().max()) if exact.numel() else 0.0)
            numbers += exact.numel()
        return cls(timestep, signal, difference if math.isfinite(difference) else math.inf, peak, numbers)

    @property
    def error(self) -> float:
        """The relative error; infinite for anything in the place of zeros."""
        return relative(self.difference, self.signal)

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio in dB, the peak being the largest magnitude of the float results.

        Infinite without a difference, minus infinity without a signal.
        """
        if self.difference == 0.0:
            return math.inf
        if self.peak == 0.0 or math.isinf(self.difference):
            return -math.inf
        return 20 * (math.log10(self.peak) - math.log10(self.difference)) + 10 * math.log10(self.numbers)

    def __add__(self, other: TimestepFidelity) -> TimestepFidelity:
        """Both together; its timestep is that of both, or None."""
        return TimestepFidelity(
            self.timestep if self.timestep == other.timestep else None,
            math.hypot(self.signal, other.signal),
            math.hypot(self.difference, other.difference),
            max(self.peak, other.peak),
            self.numbers + other.numbers,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite difference is null."""
        return {
            "timestep": self.timestep,
            "signal": self.signal,
            "difference": self.difference if math.isfinite(self.difference) else None,
            "peak": self.peak,
            "numbers": self.numbers,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimestepFidelity:
        """The inverse of :meth:`to_dict`."""
        difference = values["difference"]
        return cls(**{**values, "difference": math.inf if difference is None else difference})


@dataclass(frozen=True)
class Fidelity:
    """What quantizing changed in the results, on items that :func:`tfmq_fx.calibrate` kept.

    They are of data that the ranges were learnt from: on other data it is rather more.

    Attributes:
        timesteps: One entry per timestep that was measured, at least one; by timestep, the largest first.
    """

    timesteps: tuple[TimestepFidelity, ...]

    @classmethod
    def of(cls, measured: Iterable[TimestepFidelity]) -> Fidelity | None:
        """What was measured item by item, put together by timestep; None where nothing was."""
        together: dict[float | None, TimestepFidelity] = {}
        for item in measured:
            known = together.get(item.timestep)
            together[item.timestep] = item if known is None else known + item
        if not together:
            return None
        order = sorted(together, key=lambda timestep: (timestep is None, -(timestep or 0.0)))
        return cls(tuple(together[timestep] for timestep in order))

    @property
    def worst(self) -> TimestepFidelity:
        """The timestep with the largest relative error, of equal ones the first."""
        return max(self.timesteps, key=lambda entry: entry.error)

    @property
    def overall(self) -> TimestepFidelity:
        """All timesteps together: the norms over all of their results, the largest of their peaks."""
        first, *others = self.timesteps
        for entry in others:
            first += entry
        return first

    @property
    def error(self) -> float:
        """The relative error over all timesteps."""
        return self.overall.error

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio over all timesteps, in dB."""
        return self.overall.psnr

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"timesteps": [entry.to_dict() for entry in self.timesteps]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fidelity:
        """The inverse of :meth:`to_dict`."""
        return cls(tuple(map(TimestepFidelity.from_dict, values["timesteps"])))

    def __str__(self) -> str:
        """One line: ``relative error 0.021 (PSNR 43.0 dB), at worst 0.040 (38.1 dB) at timestep 981 of 10``."""
        text = f"relative error {self.error:.2g} (PSNR {self.psnr:.1f} dB)"
        if len(self.timesteps) == 1:
            return text + at_timestep(self.worst.timestep)
        worst = self.worst
        where = at_timestep(worst.timestep)
        return f"{text}, at worst {worst.error:.2g} ({worst.psnr:.1f} dB){where} of {len(self.timesteps)}"


def at_timestep(timestep: float | None) -> str:
    """``" at timestep 981"``; nothing where there is none."""
    return "" if timestep is None else f" at timestep {timestep:g}"


def relative(difference: float, signal: float) -> float:
    """The ratio of two norms: infinite where the first is not finite, and for anything in the place of zeros."""
    if difference == 0.0:
        return 0.0
    return difference / signal if signal and math.isfinite(difference) else math.inf
