"""The errors of this package: each message names what is wrong and what to do, in one sentence."""

from __future__ import annotations

__all__ = [
    "ArtefactError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "InputError",
    "LoweringError",
    "ReconstructionError",
    "TfmqError",
    "TimestepError",
]


class TfmqError(Exception):
    """Base of every error that this package raises on purpose."""


class CaptureError(TfmqError, ValueError):
    """The model could not be captured as one ATen graph."""


class ConfigError(TfmqError, ValueError):
    """A quantization configuration is not valid."""


class CalibrationError(TfmqError, ValueError):
    """Calibration data is missing or unusable."""


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
