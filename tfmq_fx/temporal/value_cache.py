"""Values that are computed once and kept, item by item, within a limit of memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["ValueCache", "join_items"]

Key = TypeVar("Key", bound=Hashable)
#: What is kept for an item: several tensors, each with the item's axis, of size 1, in front.
Values = tuple[Tensor, ...]


class ValueCache(Generic[Key]):
    """Values by key; the least recently used give way. Several threads may call it.

    Args:
        most_bytes: Memory for the values.

    Attributes:
        nbytes: Memory that they take.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._values: OrderedDict[Key, Values] = OrderedDict()
        self.nbytes = 0
        self._lock = threading.Lock()

    def fetch(self, keys: Sequence[Key], compute: Callable[[list[Key]], Mapping[Key, Values]]) -> list[Values]:
        """The values of each key.

        Args:
            keys: The keys of a call; some may be equal.
            compute: Called with those that are not kept, each once; not at all where there are none.
        """
        with self._lock:  # another thread's values may push these out; and what it computes is not computed twice
            values_of = {key: self._values[key] for key in keys if key in self._values}
            if missing := [key for key in dict.fromkeys(keys) if key not in values_of]:
                values_of.update(compute(missing))
            for key, values in values_of.items():
                self._store(key, values)
        return [values_of[key] for key in keys]

    def _store(self, key: Key, values: Values) -> None:
        if key in self._values:
            self._values.move_to_end(key)
            return
        self._values[key] = values
        self.nbytes += _size(values)
        while self.nbytes > self.most_bytes and len(self._values) > 1:
            _, dropped = self._values.popitem(last=False)
            self.nbytes -= _size(dropped)


def join_items(values: Sequence[Values]) -> Values:
    """The values of several items as one batch; those of one item are what is kept, and not to be written to."""
    return values[0] if len(values) == 1 else tuple(torch.cat(column) for column in zip(*values, strict=True))


def _size(values: Values) -> int:
    return sum(value.numel() * value.element_size() for value in values)
