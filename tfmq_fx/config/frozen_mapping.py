"""An immutable mapping: it hashes, copies and pickles, which ``dict`` and ``MappingProxyType`` do not all do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

__all__ = ["FrozenMapping", "freeze", "thaw"]

K = TypeVar("K")
V = TypeVar("V")


class FrozenMapping(Mapping[K, V]):
    """A mapping that cannot change, in the order in which it was given.

    Equal to any mapping with the same items; hashable when its values are.

    Args:
        values: The items.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[K, V] | None = None) -> None:
        self._values: dict[K, V] = dict(values or {})

    def __getitem__(self, key: K) -> V:
        """The value of ``key``."""
        return self._values[key]

    def __iter__(self) -> Iterator[K]:
        """The keys in order."""
        return iter(self._values)

    def __len__(self) -> int:
        """The number of items."""
        return len(self._values)

    def __hash__(self) -> int:
        """Independent of the order, as equality is."""
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        """As the dictionary with these items."""
        return repr(self._values)


def freeze(value: Any) -> Any:
    """``value`` with every mapping in it a :class:`FrozenMapping` and every list a tuple."""
    if isinstance(value, Mapping):
        return FrozenMapping({key: freeze(entry) for key, entry in value.items()})
    return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value


def thaw(value: Any) -> Any:
    """``value`` with every mapping in it a dictionary and every tuple a list, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: thaw(entry) for key, entry in value.items()}
    return list(map(thaw, value)) if isinstance(value, (list, tuple)) else value
