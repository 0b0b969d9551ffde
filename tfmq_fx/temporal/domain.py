"""What a time path is evaluated over: timesteps, with the values of whatever else it depends on.

The time path never sees the sample, so it is a function of the timestep and of few further inputs. Where these have
finitely many values, such as class labels, :func:`finite_domain` holds every combination. Conditionings, such as the
pooled embedding of a prompt, are not finitely many; those that calibration saw stand for all, and
:func:`conditioned_domain` pairs every timestep with some of them. Calibration, tables and reconstruction see a
:class:`TemporalDomain`, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tfmq_fx.passes.analysis import TemporalBlock, find_temporal_block, row_inputs
from tfmq_fx.passes.temporal.group_timesteps import group_numbers
from tfmq_fx.temporal.inputs import Conditionings

__all__ = [
    "TemporalDomain",
    "conditioned_domain",
    "finite_domain",
    "schedule_domain",
    "table_domain",
    "time_path",
]

#: Entries of a conditioned domain; every timestep has one at least.
MOST_ENTRIES = 4096
#: Numbers in the inputs of one evaluation: a prompt's tokens are large.
MOST_NUMBERS = 2**26


@dataclass(frozen=True, eq=False)
class TemporalDomain:
    """Entries that each give every input of a time path one value, the timestep's changing slowest.

    Attributes:
        timestep: Name of the timestep input.
        values: By name of an input, its distinct values, ``[P, ...]``; those of the timestep are ``[K]``.
        chosen: By name, which of its values each entry has, int64 ``[N]``.
        rows: Under which row observers with parameters per timestep see each entry, int64 ``[N]``.
    """

    timestep: str
    values: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    rows: Tensor

    def __len__(self) -> int:
        """The number of entries ``N``."""
        return len(self.rows)

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the inputs beside the timestep."""
        return tuple(name for name in self.values if name != self.timestep)

    @property
    def entry_per_row(self) -> bool:
        """Whether no two entries share a row, so that one evaluation settles it."""
        return len(set(self.rows.tolist())) == len(self)

    def columns(self, first: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """The value of each input in some of the entries, by name: ``[stop - first, ...]``."""
        return {name: values[self.chosen[name][first:stop]] for name, values in self.values.items()}

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """The columns of all entries in order, as many at once as there is room for."""
        size = max(1, MOST_NUMBERS // max(1, sum(values[0].numel() for values in self.values.values())))
        for first in range(0, len(self), size):
            yield self.columns(first, first + size)

    def sampled(self, most: int, seed: int) -> TemporalDomain:
        """At most this many of the entries, drawn at random, in their order."""
        if len(self) <= most:
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:most].sort().values
        return replace(
            self, chosen={name: chosen[drawn] for name, chosen in self.chosen.items()}, rows=self.rows[drawn]
        )

    def timesteps_of(self, rows: Collection[int]) -> Tensor:
        """The timesteps of the entries under these rows."""
        matches = torch.isin(self.rows, torch.tensor(list(rows), dtype=torch.int64))
        return self.values[self.timestep][self.chosen[self.timestep][matches]]


def finite_domain(timestep: str, values: Mapping[str, Tensor]) -> TemporalDomain:
    """Every combination of the values of the inputs, each under a row of its own.

    Args:
        timestep: Name of the timestep input.
        values: By name, the distinct values of the timestep, which is first, and of further inputs, ``[P]`` each.
    """
    grids = torch.meshgrid(*(torch.arange(len(column)) for column in values.values()), indexing="ij")
    chosen = {name: grid.reshape(-1) for name, grid in zip(values, grids, strict=True)}
    return TemporalDomain(timestep, dict(values), chosen, torch.arange(math.prod(map(len, values.values()))))


def table_domain(graph_module: fx.GraphModule, timestep: str = "timestep") -> TemporalDomain | None:
    """The finite domain behind the table rows of a graph; None where it computes no row."""
    values = row_inputs(graph_module)
    return finite_domain(timestep, values) if values else None


def schedule_domain(graph_module: fx.GraphModule, timestep: str, timesteps: Tensor | None) -> TemporalDomain | None:
    """The domain behind the table rows of a graph, else the timesteps alone; None where they are not known either."""
    domain = table_domain(graph_module, timestep)
    if domain is not None or timesteps is None:
        return domain
    return finite_domain(timestep, {timestep: timesteps})


def conditioned_domain(
    timestep: str, timesteps: Tensor, conditionings: Conditionings, most: int = MOST_ENTRIES
) -> TemporalDomain:
    """Every timestep with as many of the conditionings as fit into ``most`` entries, one at least.

    Which ones goes round, so that neighbouring timesteps together see all of them. All entries of a timestep have one
    row, its number in the order of noise (:class:`~tfmq_fx.passes.GroupTimesteps`).

    Args:
        timestep: Name of the timestep input.
        timesteps: The distinct timesteps of the schedule, ``[K]``.
        conditionings: Those of the calibration batches, one at least.
        most: How many entries.
    """
    count, steps = len(conditionings.values), len(timesteps)
    per_timestep = max(1, min(count, most // steps))
    numbers = torch.arange(steps).repeat_interleave(per_timestep)
    conditioning = torch.arange(steps * per_timestep) % count
    columns = zip(*conditionings.values, strict=True)
    further = {name: torch.stack(column) for name, column in zip(conditionings.names, columns, strict=True)}
    return TemporalDomain(
        timestep,
        {timestep: timesteps, **further},
        {timestep: numbers, **dict.fromkeys(further, conditioning)},
        group_numbers(timesteps, steps)[numbers],
    )


def time_path(graph_module: fx.GraphModule, domain: TemporalDomain) -> TemporalBlock:
    """The nodes of a graph that a domain's inputs alone lead to: the temporal block, and what conditionings join."""
    return find_temporal_block(graph_module, domain.timestep, finite=domain.further)
