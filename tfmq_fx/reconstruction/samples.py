"""Calibration batches as samples in one order, which a mini-batch can be cut from without copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.errors import CalibrationError
from tfmq_fx.frontend.batches import Batch, bind_batch
from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.sizes import entries_per_item

__all__ = ["Samples", "Window", "gather_samples"]

#: Samples that go through a unit at once outside of training.
CHUNK = 32


@dataclass(frozen=True)
class Window:
    """A run of neighbouring samples; ``chunk`` says which calibration batch it is where batches do not mix."""

    start: int
    stop: int
    chunk: int = 0

    def __len__(self) -> int:
        """The number of samples."""
        return self.stop - self.start


@dataclass(frozen=True)
class Samples:
    """The calibration data in one fixed random order.

    They are shuffled once, so that neighbouring ones are a random choice and a mini-batch is a view.

    Attributes:
        inputs: Per placeholder of the graph, in order: a tensor of all samples, or a list with one value per
            chunk where the value has no batch axis.
        count: Number of samples.
        chunks: Windows that cover the samples.
        mixing: Whether any run of samples may stand together; False when an input, such as a 0-dim timestep,
            belongs to a whole batch.
        origins: The calibration batch that each sample comes from, int64 ``[count]``.
    """

    inputs: tuple[Any, ...]
    count: int
    chunks: tuple[Window, ...]
    mixing: bool
    origins: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def tensors(self) -> list[Tensor]:
        """All that tells these samples from others: every input, and where batches end when they do not mix."""
        tensors = [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        return tensors if self.mixing else [*tensors, torch.tensor([window.stop for window in self.chunks])]

    def split(self, held_back: float) -> tuple[int, int]:
        """How many samples to train on, and how many behind them are held back; one of each where there are two."""
        if held_back == 0.0 or len(self.chunks if not self.mixing else range(self.count)) < 2:
            return self.count, 0
        if self.mixing:
            back = min(max(1, round(held_back * self.count)), self.count - 1)
        else:
            held_back_chunks = min(max(1, round(held_back * len(self.chunks))), len(self.chunks) - 1)
            back = self.count - self.chunks[-held_back_chunks].start
        return self.count - back, back

    def draw(self, size: int, count: int, generator: torch.Generator) -> Window:
        """Draw at most ``size`` of the first ``count`` samples; a whole chunk where batches do not mix."""
        if not self.mixing:
            whole = [window for window in self.chunks if window.stop <= count]
            return whole[int(torch.randint(len(whole), (), generator=generator))]
        size = min(size, count)
        start = int(torch.randint(count - size + 1, (), generator=generator))
        return Window(start, start + size)

    def windows(self, start: int, stop: int) -> list[Window]:
        """Windows of at most a chunk that cover the samples from ``start`` to ``stop``."""
        if not self.mixing:
            return [window for window in self.chunks if start <= window.start and window.stop <= stop]
        return [Window(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]


def gather_samples(prepared: fx.GraphModule, batches: Iterable[Batch], seed: int) -> Samples:
    """Collect and shuffle the calibration batches.

    Args:
        prepared: The graph that they are for.
        batches: The model's own inputs.
        seed: Seed of the order.

    Raises:
        CalibrationError: There are none, or one does not fit the graph.
    """
    interface = interface_of(prepared)
    timestep = PreparedState.of(prepared).timestep
    placeholders = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    calls = [bind_batch(interface, index, batch, timestep) for index, batch in enumerate(batches)]
    flat = [call.leaves for call in calls]
    if not flat:
        msg = "reconstruction got no batches; pass those that the model was calibrated on"
        raise CalibrationError(msg)
    batched = [_has_batch_axis(node) for node in placeholders]
    # A graph of a fixed batch: its samples are not told apart.
    sizes = [_size(call) for call in calls]
    origins = torch.arange(len(flat)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    tensors = [isinstance(node_value(node), Tensor) for node in placeholders]
    if all(has_batch or not tensor for has_batch, tensor in zip(batched, tensors, strict=True)):
        count = sum(sizes)
        order = torch.randperm(count, generator=generator)
        columns = list(zip(*flat, strict=True))
        inputs = tuple(
            torch.cat(column)[order] if has_batch else [column[0]]
            for column, has_batch in zip(columns, batched, strict=True)
        )
        chunks = tuple(Window(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
        return Samples(inputs, count, chunks, mixing=True, origins=origins[order])
    shuffled = torch.randperm(len(flat), generator=generator).tolist()
    columns = list(zip(*(flat[i] for i in shuffled), strict=True))
    inputs = tuple(
        torch.cat(column) if has_batch else list(column) for column, has_batch in zip(columns, batched, strict=True)
    )
    windows, start = [], 0
    for chunk, index in enumerate(shuffled):
        windows.append(Window(start, start + sizes[index], chunk))
        start += sizes[index]
    origins = torch.tensor(shuffled).repeat_interleave(torch.tensor([sizes[index] for index in shuffled]))
    return Samples(inputs, start, tuple(windows), mixing=False, origins=origins)


def _has_batch_axis(node: fx.Node) -> bool:
    """Whether a placeholder has one value per item of the batch."""
    value = node_value(node)
    return isinstance(value, Tensor) and value.ndim > 0 and entries_per_item(value.shape[0]) == 1


def _size(call: Call) -> int:
    if call.batch is not None:
        return call.batch
    return next((len(leaf) for leaf in call.leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
