"""Checks of configuration values, worded alike everywhere.

One rule for all of them: a value is of the type that its field has, NumPy's numbers, truth values and strings count as
Python's, and an integer counts as a float; anything else is a :class:`ConfigError`. Each check returns the value as
Python's own type, so a configuration is plain JSON whatever it was made from.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from tfmq_fx.errors import ConfigError

__all__ = ["check_choice", "check_fields", "check_names", "check_number", "check_pair", "check_switch", "check_whole",
           "plain", "shown"]  # fmt: skip

LONGEST = 80
#: What an exponent may be at the most: as good as infinite, and a float.
LARGEST = 1e6


def plain(value: Any) -> Any:
    """``value`` as Python's own type where it is one of NumPy's scalars, or of a subclass of numbers or strings."""
    # Not imported here: the command line's help needs this file, and whoever has a value of NumPy's has imported it.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.bool_, numpy.number)):
        return value.item()
    if isinstance(value, str):
        return str.__str__(value)  # of a member of an enumeration str() is its name
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def shown(value: Any) -> str:
    """``value`` in a message: one line, not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """The one of ``choices`` that ``value`` is, of the same type; raise :class:`ConfigError` where it is none."""
    found = plain(value)
    for choice in choices:
        if type(found) is type(choice) and found == choice:
            return choice
    msg = f"{name}={shown(value)} is not supported: use one of {', '.join(map(repr, choices))}"
    raise ConfigError(msg)


def check_switch(name: str, value: Any) -> bool:
    """``value``, True or False; raise :class:`ConfigError` where it is neither."""
    return bool(check_choice(name, value, (False, True)))


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value``, a whole number from ``least`` to ``most``; raise :class:`ConfigError` where it is none."""
    found = plain(value)
    if type(found) is not int or found < least or (most is not None and found > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        msg = f"{name}={shown(value)} must be a whole number {bounds}"
        raise ConfigError(msg)
    return found


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """``value``, a number in ``[low, high]``; raise :class:`ConfigError` where it is none."""
    found = plain(value)
    if type(found) not in (int, float) or not low <= found <= high:
        msg = f"{name}={shown(value)} must be a number from {low:g} to {high:g}"
        raise ConfigError(msg)
    return float(found)


def check_pair(name: str, value: Any) -> tuple[float, float]:
    """``value``, two numbers ``start >= end >= 1``; raise :class:`ConfigError` where it is not."""
    found = [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else []
    numbers = len(found) == 2 and all(type(number) in (int, float) for number in found)
    if not numbers or not LARGEST >= found[0] >= found[1] >= 1:
        msg = f"{name}={shown(value)} must be a pair (start, end) with {LARGEST:g} >= start >= end >= 1"
        raise ConfigError(msg)
    return float(found[0]), float(found[1])


def check_names(name: str, value: Any) -> tuple[str, ...]:
    """``value``, roles and patterns of names; a bare string is one entry, not its letters.

    Raises :class:`ConfigError` where it is something else.
    """
    entries = (value,) if isinstance(value, str) else value
    if not isinstance(entries, (Sequence, Set)) or not all(isinstance(entry, str) for entry in entries):
        msg = f"{name}={shown(value)} must be a tuple of roles and name patterns, such as ('input',)"
        raise ConfigError(msg)
    return tuple(map(plain, entries))


def check_fields(values: Any, fields: Collection[str], what: str) -> dict[str, Any]:
    """``values``, a mapping of some of these fields; raise :class:`ConfigError` where it is none.

    Args:
        values: What was given.
        fields: The names of all fields.
        what: What a field is called in the message, such as ``"configuration"``.
    """
    if not isinstance(values, Mapping):
        msg = f"the {what} is {shown(values)} instead of a dictionary of its fields"
        raise ConfigError(msg)
    if unknown := [name for name in values if name not in fields]:
        first = min(map(shown, unknown))
        msg = f"unknown {what} field {first}; the fields are {', '.join(sorted(fields))}"
        raise ConfigError(msg)
    return dict(values)
