"""Read JSON from strangers: bounds first, then one field after the other, each of one exact type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tfmq_fx.errors import ArtefactError

__all__ = ["checked", "fields_of", "identifier", "items", "parse_json", "whole"]

T = TypeVar("T")

#: Objects, lists and values of one file: Python takes some 200 bytes for an object, whatever it holds.
MOST_OBJECTS, MOST_LISTS, MOST_VALUES = 1_000_000, 1_000_000, 4_000_000
#: Numbers of a tensor, and of anything that is counted.
MOST = 2**63


def parse_json(data: bytes, what: str, most_bytes: int) -> Any:
    """The values of a JSON file.

    Args:
        data: The file.
        what: What it is, for the message.
        most_bytes: How long it may be; with :data:`MOST_OBJECTS` this bounds what the values take.

    Raises:
        ArtefactError: It is too long, nested too deep, or no JSON.
    """
    counts = (data.count(b"{"), data.count(b"["), data.count(b","))
    if len(data) > most_bytes or any(
        n > most for n, most in zip(counts, (MOST_OBJECTS, MOST_LISTS, MOST_VALUES), strict=True)
    ):
        msg = f"{what} holds more than any quantized program has; do not trust this file"
        raise ArtefactError(msg)
    try:
        return json.loads(data)
    except RecursionError as error:
        msg = f"{what} is nested deeper than any quantized program is; do not trust this file"
        raise ArtefactError(msg) from error
    except ValueError as error:
        msg = f"{what} is truncated or not JSON ({error}); save the program again"
        raise ArtefactError(msg) from error


def checked(value: Any, kinds: type[T] | tuple[type[T], ...], what: str) -> T:
    """``value``, which is exactly of one of these types: True is no integer here.

    Raises:
        ArtefactError: It is of another type.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in allowed:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        msg = f"{what} is {str(value)[:60]!r} instead of a {names}; it was changed, save the program again"
        raise ArtefactError(msg)
    result: T = value
    return result


def whole(value: Any, what: str, least: int = 0, most: int = MOST - 1) -> int:
    """``value``, an integer between ``least`` and ``most``.

    Raises:
        ArtefactError: It is not.
    """
    if not least <= checked(value, int, what) <= most:
        msg = f"{what} is {str(value)[:60]}, outside {least} to {most}; it was changed, save the program again"
        raise ArtefactError(msg)
    number: int = value
    return number


def identifier(value: Any, what: str) -> str:
    """``value``, a name that generated code may hold.

    Raises:
        ArtefactError: It is none.
    """
    if not (checked(value, str, what).isidentifier() and value.isascii() and len(value) <= 256):
        msg = f"{what} is {value[:60]!r}, which is no name; do not trust this file"
        raise ArtefactError(msg)
    name: str = value
    return name


def items(value: Any, what: str, most: int = MOST_VALUES) -> list[Any]:
    """``value``, a list of at most so many items.

    Raises:
        ArtefactError: It is not.
    """
    values: list[Any] = checked(value, list, what)
    if len(values) > most:
        msg = f"{what} has {len(values)} items, more than {most}; do not trust this file"
        raise ArtefactError(msg)
    return values


def fields_of(value: Any, names: Iterable[str], what: str, optional: Iterable[str] = ()) -> Mapping[str, Any]:
    """``value``, an object with exactly these fields, and maybe the ``optional`` ones.

    Raises:
        ArtefactError: It is none, lacks a field, or has another.
    """
    values: dict[str, Any] = checked(value, dict, what)
    for name in names:
        if name not in values:
            msg = f"{what} has no field {name!r}; it was changed, save the program again"
            raise ArtefactError(msg)
    if unknown := sorted(set(values) - {*names, *optional}):
        msg = f"{what} has a field {unknown[0][:60]!r} that it should not have; it was changed, save the program again"
        raise ArtefactError(msg)
    return values
