"""What requantizing other weights kept, what it widened, and how far the result is from the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tfmq_fx.quantization.fidelity import Fidelity

__all__ = ["Requantization", "WidenedRange"]

#: Widened ranges that the text names.
MOST_NAMED = 3


@dataclass(frozen=True)
class WidenedRange:
    """A range that the other weights' activations left.

    Attributes:
        subject: What is quantized with it, such as ``"the input of layer 'mid.conv1'"``.
        widened: How many of its rows were widened; a range for all timesteps has one.
        rows: How many rows it has: timesteps, or groups of them.
        factor: The widest of them over what it was; infinite where that was nothing but zero.
    """

    subject: str
    widened: int
    rows: int
    factor: float

    def __str__(self) -> str:
        """``the input of layer 'mid.conv1': 2.1 times as wide (50 of 50 rows)``."""
        rows = f" ({self.widened} of {self.rows} rows)" if self.rows > 1 else ""
        return f"{self.subject}: {self.factor:.2g} times as wide{rows}"


@dataclass(frozen=True)
class Requantization:
    """How :func:`tfmq_fx.requantize` made a program; it is not saved with it.

    Attributes:
        kept: How many activations have the ranges that the other program had.
        widened: The ranges that were widened, the most first.
        timesteps: At which timesteps ranges were checked, in the order in which they were met; empty where the model
            has none.
        drawn: Whether they were checked on noise; False for batches that the user gave.
        fidelity: How far the program is from the float model on the items of the check.
    """

    kept: int
    widened: tuple[WidenedRange, ...]
    timesteps: tuple[float, ...]
    drawn: bool
    fidelity: Fidelity | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, but for an infinite factor."""
        return {
            "kept": self.kept,
            "widened": [vars(entry) for entry in self.widened],
            "timesteps": list(self.timesteps),
            "drawn": self.drawn,
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
        }

    def __str__(self) -> str:
        """Two lines, and one for each of the most widened ranges."""
        source = "noise" if self.drawn else "the given batches"
        where = f", at {len(self.timesteps)} timesteps" if self.timesteps else ""
        lines = [f"{self.kept} activations keep their ranges, checked on {source}{where}; {len(self.widened)} widened"]
        lines += [f"  {entry}" for entry in self.widened[:MOST_NAMED]]
        if len(self.widened) > MOST_NAMED:
            lines.append(f"  … {len(self.widened) - MOST_NAMED} more")
        if self.fidelity is not None:
            lines.append(f"compared with float, on {source}: {self.fidelity}")
        return "\n".join(lines)
