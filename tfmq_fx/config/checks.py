"""Checks of configuration values, worded alike everywhere."""

from __future__ import annotations

from typing import Any

from tfmq_fx.errors import ConfigError

__all__ = ["check_choice", "check_number", "check_whole"]


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        msg = f"{name}={value!r} is not supported: use one of {', '.join(map(repr, choices))}"
        raise ConfigError(msg)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name}={value!r} must be a whole number of at least {least}"
        raise ConfigError(msg)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a number in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        msg = f"{name}={value!r} must be a number from {low:g} to {high:g}"
        raise ConfigError(msg)
