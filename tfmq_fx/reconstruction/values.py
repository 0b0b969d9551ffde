"""What a node of the graph computes over all calibration samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from tfmq_fx._torch import pytree
from tfmq_fx.passes.support.sizes import concrete_size, entries_per_item
from tfmq_fx.reconstruction.samples import Samples, Window
from tfmq_fx.reconstruction.store import ActivationStore

__all__ = ["Batches", "Leaf", "PerSample", "Size", "collect", "in_window"]


@dataclass(frozen=True)
class PerSample:
    """A tensor with ``per_item`` neighbouring entries along axis 0 for each calibration sample, all in one piece."""

    tensor: Tensor
    per_item: int = 1

    def at(self, window: Window) -> Tensor:
        """The entries of a window: a view."""
        return self.tensor[window.start * self.per_item : window.stop * self.per_item]


@dataclass(frozen=True)
class Batches:
    """A value without a batch axis: one per chunk, or one for all."""

    values: tuple[Any, ...]

    def at(self, window: Window) -> Any:
        """The value for a window."""
        return self.values[window.chunk] if len(self.values) > 1 else self.values[0]


@dataclass(frozen=True)
class Size:
    """A number that follows from the size of the batch."""

    symbol: Any

    def at(self, window: Window) -> int:
        """The number for a window."""
        return int(concrete_size(self.symbol, len(window)))


Leaf = PerSample | Batches | Size


def in_window(value: Any, window: Window) -> Any:
    """Resolve a structure of leaves for a window."""
    return pytree.tree_map(lambda leaf: leaf.at(window) if isinstance(leaf, Leaf) else leaf, value)


def collect(samples: Samples, example: Any, compute: Callable[[Window], Any], store: ActivationStore) -> Any:
    """Compute a value chunk by chunk and keep it.

    Args:
        samples: The calibration samples.
        example: The node's ``meta["val"]``: tells which axes grow with the batch.
        compute: Gives the value for a window.
        store: Where tensors of many samples lie.

    Returns:
        The structure of ``example`` with a :class:`Leaf` for each entry.
    """
    examples, spec = pytree.tree_flatten(example)
    if all(isinstance(leaf, SymInt) for leaf in examples) and examples:
        return pytree.tree_unflatten([Size(leaf) for leaf in examples], spec)
    collected: list[list[Any]] = [[] for _ in examples]
    stored: list[Tensor | None] = [None] * len(examples)
    entries = [entries_per_item(leaf.shape[0]) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in examples]
    for window in samples.chunks:
        tensor_leaves = pytree.tree_leaves(compute(window))
        for i, leaf in enumerate(tensor_leaves):
            each = entries[i]
            if each is None:
                if samples.mixing and collected[i]:
                    continue
                collected[i].append(leaf)
                continue
            target = stored[i]
            if target is None:
                target = stored[i] = store.allocate((samples.count * each, *leaf.shape[1:]), leaf.dtype)
            target[window.start * each : window.stop * each] = leaf
    leaves: list[Leaf] = []
    for i, leaf in enumerate(examples):
        target = stored[i]
        if isinstance(leaf, SymInt):
            leaves.append(Size(leaf))
        elif target is not None:
            leaves.append(PerSample(target, entries[i] or 1))
        else:
            leaves.append(Batches(tuple(collected[i])))
    return pytree.tree_unflatten(leaves, spec)


def placeholder_value(column: Any) -> Leaf:
    """The leaf for one column of :attr:`Samples.inputs`."""
    return PerSample(column) if isinstance(column, torch.Tensor) else Batches(tuple(column))
