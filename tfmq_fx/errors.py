"""The errors of this package: each message names what is wrong and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ArtefactError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "FidelityError",
    "InputError",
    "LoweringError",
    "NonFiniteError",
    "ReconstructionError",
    "TfmqError",
    "TimestepError",
    "UnsupportedError",
]


class TfmqError(Exception):
    """Base of every error that this package raises on purpose."""


class CaptureError(TfmqError, ValueError):
    """The model could not be captured as one ATen graph."""


class ConfigError(TfmqError, ValueError):
    """A quantization configuration is not valid."""


class CalibrationError(TfmqError, ValueError):
    """Calibration data is missing or unusable."""


class NonFiniteError(CalibrationError):
    """A tensor that ranges are taken from holds NaN or infinite values.

    Who raises it knows the tensor; who called that knows the batch and its timesteps, and says so with :meth:`at`.

    Attributes:
        subject: What the tensor is, with the name of its layer.
        entries: Which entries of its first axis hold such values.
        length: How many entries that axis has.
        rows: The rows of the timestep table that these entries belong to, where that is known.
        place: Where in the calibration data they are, as words that follow "values"; empty when unknown.
    """

    def __init__(
        self, subject: str, entries: Sequence[int] = (), length: int = 0, rows: Sequence[int] = (), place: str = ""
    ) -> None:
        super().__init__(subject, entries, length, rows, place)
        self.subject, self.place = subject, place
        self.entries, self.length, self.rows = tuple(entries), length, tuple(rows)

    def at(self, place: str) -> NonFiniteError:
        """The same with a place, such as ``" in calibration batch 3, at timestep 40"``."""
        return NonFiniteError(self.subject, self.entries, self.length, self.rows, place)

    def __str__(self) -> str:
        """The sentence."""
        place = self.place
        if not place and self.rows:
            place = f" in row {self.rows[0]} of the timestep table"
        elif not place and self.entries:
            place = f" in entry {self.entries[0]} of the {self.length} along its first axis"
        return (
            f"{self.subject} holds NaN or infinite values{place}; remove what leads there, or mend where they come from"
        )


class FidelityError(TfmqError, ValueError):
    """A quantized program parts from its float model by more than was allowed."""


class ReconstructionError(TfmqError, RuntimeError):
    """Weights could not be reconstructed, or a saved state belongs to another run."""


class TimestepError(TfmqError, ValueError):
    """A timestep is not in the table of the quantized program."""


class ArtefactError(TfmqError, ValueError):
    """A saved program is truncated, changed, foreign, or cannot be written."""


class LoweringError(TfmqError, RuntimeError):
    """A program could not be lowered, or the lowered program parts from its reference."""


class InputError(LoweringError, ValueError):
    """The inputs of a call do not fit what the program was captured with."""


class UnsupportedError(TfmqError, ValueError):
    """A quantized model cannot do what its float model can; the message says what to do instead."""
