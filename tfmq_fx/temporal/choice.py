"""What ``temporal="auto"`` chose for one temporal feature."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["TemporalChoice"]


@dataclass(frozen=True)
class TemporalChoice:
    """Which rows of a temporal feature are in the table, and how far both candidates are from the float feature.

    Attributes:
        layer: The embedding layer behind the feature.
        kept: ``"cached"``, the rows of the float block; or ``"quantized"``, those of the quantized block.
        cached_error: Relative error of the float rows, stored as the table is, over all timesteps.
        quantized_error: The same of the quantized block's rows.
    """

    layer: str
    kept: Literal["cached", "quantized"]
    cached_error: float
    quantized_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """One line."""
        errors = f"cached {self.cached_error:.2e}, quantized {self.quantized_error:.2e}"
        return f"{self.layer}: {self.kept} rows (error {errors})"
