"""The conditionings of calibration batches: what stands beside the timestep in layers that the sample does not reach.

Timesteps are finitely many, conditionings are not; those that calibration saw stand for all. So such layers are
calibrated and reconstructed over pairs: every timestep of the schedule, each with conditionings of the batches. No
image takes part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from tfmq_fx.frontend.binding import Call
from tfmq_fx.frontend.tensors import contiguous

__all__ = ["ConditionedTimesteps", "Conditionings"]

#: Pairs of one evaluation over all timesteps; every timestep has one at least.
MOST_PAIRS = 4096
#: Numbers in the conditionings of one call: a prompt's tokens are large.
MOST_NUMBERS = 2**26


@dataclass
class Conditionings:
    """Distinct conditionings, in the order in which they were seen.

    Attributes:
        names: Names of the inputs.
        rows: One tuple of values for each, ``[...]`` without the batch's axis, in the order of ``names``.
    """

    names: tuple[str, ...]
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)
    _known: set[bytes] = field(default_factory=set, repr=False)

    def add(self, graph_module: fx.GraphModule, call: Call) -> None:
        """Take those of a calibration batch of the graph."""
        placeholders = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
        leaves = dict(zip(placeholders, call.leaves, strict=True))
        for row in zip(*(leaves[name] for name in self.names), strict=True):
            key = _digest(row)
            if key not in self._known:
                self._known.add(key)
                self.rows.append(tuple(value.detach().clone() for value in row))

    def with_timesteps(self, timesteps: Tensor, timestep: str, most: int = MOST_PAIRS) -> ConditionedTimesteps:
        """Pair every timestep with as many conditionings as fit into ``most`` pairs, one at least.

        Which ones goes round, so that neighbouring timesteps together see all of them.

        Args:
            timesteps: Those of the schedule, ``[K]``.
            timestep: Name of the timestep input.
            most: How many pairs.
        """
        count = len(self.rows)
        each = max(1, min(count, most // len(timesteps)))
        first = torch.arange(len(timesteps))[:, None] * each
        chosen = (first + torch.arange(each)) % count
        numbers = torch.arange(len(timesteps))[:, None].expand_as(chosen)
        columns = {
            name: torch.stack(column) for name, column in zip(self.names, zip(*self.rows, strict=True), strict=True)
        }
        return ConditionedTimesteps(timestep, timesteps, columns, numbers.reshape(-1), chosen.reshape(-1))


@dataclass(frozen=True)
class ConditionedTimesteps:
    """Pairs of timestep and conditioning, the timestep's changing slowest.

    Attributes:
        timestep: Name of the timestep input.
        timesteps: The timesteps, ``[K]``.
        conditionings: By name, the values of each conditioning, ``[P, ...]``.
        numbers: The timestep of each pair, int64 ``[R]``.
        chosen: The conditioning of each pair, int64 ``[R]``.
    """

    timestep: str
    timesteps: Tensor
    conditionings: dict[str, Tensor]
    numbers: Tensor
    chosen: Tensor

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.numbers)

    def columns(self, first: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """The values of the inputs in some of the pairs, by name: ``[stop - first, ...]`` each."""
        chosen = self.chosen[first:stop]
        values = {name: values[chosen] for name, values in self.conditionings.items()}
        return {self.timestep: self.timesteps[self.numbers[first:stop]], **values}

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """The pairs in order, as many at once as there is room for."""
        size = max(1, MOST_NUMBERS // max(1, sum(values[0].numel() for values in self.conditionings.values())))
        for first in range(0, len(self), size):
            yield self.columns(first, first + size)

    def sampled(self, most: int, seed: int) -> ConditionedTimesteps:
        """At most this many of the pairs, drawn at random, in their order."""
        if len(self) <= most:
            return self
        kept = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:most].sort().values
        return ConditionedTimesteps(
            self.timestep, self.timesteps, self.conditionings, self.numbers[kept], self.chosen[kept]
        )


def _digest(row: Sequence[Tensor]) -> bytes:
    """A hash of the bits of a conditioning."""
    state = hashlib.blake2b(digest_size=16)
    for value in row:
        state.update(contiguous(value.cpu()).reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.digest()
