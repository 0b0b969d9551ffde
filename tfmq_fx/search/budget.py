"""What a search may spend."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from tfmq_fx.config.checks import shown
from tfmq_fx.errors import ConfigError

__all__ = ["Budget"]

#: A budget as text: its measure, the number, and the x of a ratio.
PATTERN = re.compile(r"(size|latency|psnr)\s*=\s*([0-9.]+(?:e-?\d+)?)\s*(x|dB)?", re.IGNORECASE)
UNITS = {"size": "x", "latency": "x", "psnr": ""}


@dataclass(frozen=True)
class Budget:
    """A bound for one measure; the search makes the error least under it, under ``psnr`` the size.

    Attributes:
        measure: ``"size"``: bytes of the artefact over those of the float model's weights, at most; ``"latency"``: time
            of a step over that of W8A8 everywhere, at most; ``"psnr"``: of the predictions to the float model's, in dB,
            at least.
        limit: The bound, above 0.
    """

    measure: Literal["size", "latency", "psnr"]
    limit: float

    @classmethod
    def of(cls, value: Any) -> Budget:
        """``value``, or what a text such as ``"size=0.2x"``, ``"latency=1.1x"`` or ``"psnr=40"`` says.

        Raises:
            ConfigError: It is neither.
        """
        if isinstance(value, cls):
            return value
        match = PATTERN.fullmatch(value.strip()) if isinstance(value, str) else None
        try:
            limit = float(match[2]) if match is not None else math.nan
        except ValueError:  # such as 1.2.3
            limit = math.nan
        unit = "" if match is None else (match[3] or "").lower()
        measure = "" if match is None else match[1].lower()
        if not (0 < limit < math.inf) or unit not in ("", "db" if measure == "psnr" else "x"):
            msg = f"budget={shown(value)} is not supported: write size=0.2x, latency=1.1x or psnr=40"
            raise ConfigError(msg)
        return cls(measure, limit)  # type: ignore[arg-type]  # the pattern knows no others

    def __str__(self) -> str:
        """As it is written."""
        return f"{self.measure}={self.limit:g}{UNITS[self.measure]}"
