"""Where in the calibration data a refused tensor was: the batch and its timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.errors import NonFiniteError
from tfmq_fx.observers import PerChannelWeightObserver
from tfmq_fx.observers.timestep_ranges import TimestepRanges, ranges_of, snapshot
from tfmq_fx.temporal.domain import TemporalDomain

__all__ = ["at_timesteps", "refused_in_batch", "refused_rows", "refused_whole", "timestep_ranges"]

#: Timesteps that an error names; the others it counts.
MOST_NAMED = 4


def at_timesteps(values: Tensor) -> str:
    """``" at timestep 40"``, or several; nothing when there are none."""
    distinct = list(dict.fromkeys(values.reshape(-1).tolist()))
    named = ", ".join(f"{value:g}" for value in distinct[:MOST_NAMED])
    more = f" and {len(distinct) - MOST_NAMED} more" if len(distinct) > MOST_NAMED else ""
    return f" at timestep{'s' if len(distinct) > 1 else ''} {named}{more}" if distinct else ""


@contextmanager
def refused_rows(domain: TemporalDomain, timesteps: Tensor) -> Iterator[None]:
    """Name the timesteps of what is refused inside the block.

    Args:
        domain: What the graph is evaluated over.
        timesteps: Those of the entries that are evaluated there, ``[N]``.
    """
    try:
        yield
    except NonFiniteError as error:
        refused = domain.timesteps_of(error.rows) if error.rows else _timesteps_of_entries(error, timesteps)
        raise error.at(at_timesteps(refused)) from error


@contextmanager
def refused_whole(prepared: nn.Module) -> Iterator[None]:
    """Run a calibration batch: where it fails, no observer has learnt from any part of it."""
    restore = snapshot(_batch_observers(prepared))
    try:
        yield
    except Exception:
        restore()
        raise


@contextmanager
def refused_in_batch(index: int, timesteps: Tensor | None) -> Iterator[None]:
    """Name the batch and the timesteps of what is refused.

    Args:
        index: The number of the batch.
        timesteps: Those of the items that run, in their order; None where there are none.
    """
    try:
        yield
    except NonFiniteError as error:
        items = torch.zeros(0) if timesteps is None else timesteps.reshape(-1)
        # All of them where entries are not items.
        refused = _timesteps_of_entries(error, items)
        when = at_timesteps(refused if len(refused) else items)
        location = f" in calibration batch {index}{',' if when else ''}{when}"
        raise error.at(location) from error


def timestep_ranges(prepared: nn.Module) -> list[TimestepRanges]:
    """What the observers of a graph keep by timestep while it is calibrated."""
    return [ranges for module in _batch_observers(prepared) if (ranges := ranges_of(module)) is not None]


def _batch_observers(prepared: nn.Module) -> list[nn.Module]:
    """The observers that learn from batches; a weight is the same in all of them."""
    observers = [module for module in prepared.modules() if isinstance(module, ObserverBase)]
    return [module for module in observers if not isinstance(module, PerChannelWeightObserver)]


def _timesteps_of_entries(error: NonFiniteError, items: Tensor) -> Tensor:
    """The timesteps of the refused entries out of those of all items; none where entries are not items."""
    each, rest = divmod(error.length, max(1, len(items)))
    if rest or not each:
        return items[:0]
    # Entries of one item lie side by side: its tokens, its heads.
    return items[sorted({entry // each for entry in error.entries})]
