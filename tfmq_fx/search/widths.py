"""The widths that a layer may have: what the search chooses from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfmq_fx.config.bits import FLOAT_BITS
from tfmq_fx.config.checks import check_names, shown
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ConfigError

__all__ = ["BASE", "DEFAULT_CANDIDATES", "Widths", "check_candidates"]

PATTERN = re.compile(r"w(\d+)a(\d+)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Widths:
    """The widths of a layer.

    Attributes:
        weight_bits: Bits of its weight, 32 for float.
        activation_bits: Bits of its input, 32 for float.
    """

    weight_bits: int
    activation_bits: int

    @property
    def is_float(self) -> bool:
        """Whether nothing of it is quantized."""
        return self.weight_bits == self.activation_bits == FLOAT_BITS

    @property
    def has_integer_kernel(self) -> bool:
        """Whether integer kernels take it: weights of 4 bits run on those of 8, and no width beyond 8 has one."""
        return max(self.weight_bits, self.activation_bits) <= BASE.weight_bits

    def of(self, config: QuantizationConfig) -> QuantizationConfig:
        """A configuration with these widths for all layers."""
        widths = dataclasses.asdict(self)
        return dataclasses.replace(config, overrides={}, **widths)

    def __str__(self) -> str:
        """``"w8a8"``, or ``"float"``."""
        return "float" if self.is_float else f"w{self.weight_bits}a{self.activation_bits}"


#: What every layer has that gets no other widths.
BASE = Widths(8, 8)
#: What is chosen from unless the user says otherwise.
DEFAULT_CANDIDATES = ("w8a8", "w4a8", "float")


def check_candidates(names: Any) -> tuple[Widths, ...]:
    """Read candidates such as ``("w8a8", "w4a8", "float")``, or one string with commas.

    Raises:
        ConfigError: One is not of that form or its widths are not supported, or there are fewer than two.
    """
    entries: Sequence[str] = names.split(",") if isinstance(names, str) else check_names("candidates", names)
    candidates = tuple(dict.fromkeys(_candidate(entry.strip()) for entry in entries))
    if len(candidates) < 2:
        msg = f"candidates={shown(names)} leaves nothing to choose: name two or more, such as 'w8a8,w4a8,float'"
        raise ConfigError(msg)
    return candidates


def _candidate(name: str) -> Widths:
    if name.lower() == "float":
        return Widths(FLOAT_BITS, FLOAT_BITS)
    match = PATTERN.fullmatch(name)
    if match is None:
        msg = f"candidate {shown(name)} is not supported: write widths as 'w4a8', or 'float'"
        raise ConfigError(msg)
    widths = Widths(int(match[1]), int(match[2]))
    widths.of(QuantizationConfig())  # refuses what no layer can have
    return widths
