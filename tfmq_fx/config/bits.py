"""Bit widths, and which of them a configuration may have."""

from __future__ import annotations

from typing import Any

from tfmq_fx.config.checks import plain, shown
from tfmq_fx.errors import ConfigError

__all__ = ["FLOAT_BITS", "NARROW_BITS", "check_bits"]

#: A bit width that means "leave it in floating point".
FLOAT_BITS = 32
BITS = (*range(2, 9), 16, FLOAT_BITS)
#: Weights of at most this many bits lose much when they are rounded to nearest.
NARROW_BITS = 6


def check_bits(name: str, bits: Any, *, optional: bool = False) -> Any:
    """``bits``, a width that is supported (or None where it is optional).

    Raises:
        ConfigError: It is none.
    """
    found = plain(bits)
    if not (optional and found is None) and (type(found) is not int or found not in BITS):
        msg = f"{name}={shown(bits)} is not supported: use 2 to 8, 16, or {FLOAT_BITS} for float"
        raise ConfigError(msg)
    return found
