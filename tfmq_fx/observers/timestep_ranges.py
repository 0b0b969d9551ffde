"""Ranges by timestep while calibration runs, so that what is averaged does not depend on how batches were cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LEAST_ITEMS", "CalibratedItems", "TimestepRanges", "ranges_of", "smoothed", "snapshot"]

#: The timesteps of a call: one, or several where a call cannot be cut.
Timesteps = tuple[float, ...]

#: Neighbouring timesteps are taken together until so many items are: the range of a single one is too narrow.
LEAST_ITEMS = 8


@dataclass
class CalibratedItems:
    """What a calibration has run; its observers share one.

    Attributes:
        current: The timesteps of the call that runs now.
        counts: Items that have run, by the timesteps of their call.
    """

    current: Timesteps = ()
    counts: dict[Timesteps, int] = field(default_factory=dict)

    def add(self, timesteps: Timesteps, items: int) -> None:
        """Count the items of a call that has run."""
        self.counts[timesteps] = self.counts.get(timesteps, 0) + items

    def begin_schedule(self) -> None:
        """What runs next is every timestep of the schedule at once; it counts as a timestep of its own."""
        self.current = ()
        self.counts[()] = LEAST_ITEMS

    def buckets(self) -> list[list[Timesteps]]:
        """Neighbouring timesteps with enough items together, in the order in which the first of each was met."""
        buckets: list[list[Timesteps]] = []
        items = LEAST_ITEMS
        for timesteps in sorted(self.counts):
            if items >= LEAST_ITEMS:
                buckets.append([])
                items = 0
            buckets[-1].append(timesteps)
            items += self.counts[timesteps]
        if items < LEAST_ITEMS and len(buckets) > 1:
            rest = buckets.pop()
            buckets[-1].extend(rest)
        met = {timesteps: number for number, timesteps in enumerate(self.counts)}
        return sorted(buckets, key=lambda bucket: min(met[timesteps] for timesteps in bucket))


class TimestepRanges:
    """The smallest and the largest value of each timestep, over all its items.

    Attributes:
        items: What the calibration has run; None outside :func:`tfmq_fx.calibrate`, where nobody knows the timesteps.
    """

    def __init__(self) -> None:
        self.items: CalibratedItems | None = None
        self._ends: dict[Timesteps, tuple[Tensor, Tensor]] = {}

    def add(self, low: Tensor, high: Tensor) -> None:
        """Take in what the current call has; ends of one shape, infinite (``low > high``) where nothing was seen."""
        assert self.items is not None
        timesteps = self.items.current
        if timesteps in self._ends:
            earlier_low, earlier_high = self._ends[timesteps]
            low, high = torch.minimum(earlier_low, low), torch.maximum(earlier_high, high)
        self._ends[timesteps] = low, high

    def snapshot(self) -> dict[Timesteps, tuple[Tensor, Tensor]]:
        """What was taken in so far, for :meth:`restore`."""
        return dict(self._ends)

    def restore(self, ends: dict[Timesteps, tuple[Tensor, Tensor]]) -> None:
        """Forget what came after a :meth:`snapshot`."""
        self._ends = dict(ends)

    def by_bucket(self) -> list[tuple[Tensor, Tensor]]:
        """The ends of each bucket of timesteps (:meth:`CalibratedItems.buckets`); none outside a calibration."""
        if self.items is None:
            return []
        ranges = []
        for bucket in self.items.buckets():
            if members := [self._ends[timesteps] for timesteps in bucket if timesteps in self._ends]:
                lows, highs = zip(*members, strict=True)
                ranges.append((torch.stack(lows).amin(0), torch.stack(highs).amax(0)))
        return ranges


def smoothed(value: Tensor, new: Tensor, momentum: float) -> Tensor:
    """One step of an exponential moving average, ``m v + (1 - m) n``."""
    return (value * momentum).add(new, alpha=1 - momentum)


def ranges_of(module: nn.Module) -> TimestepRanges | None:
    """What an observer keeps by timestep; None where it keeps nothing so."""
    ranges = getattr(module, "ranges", None)
    return ranges if isinstance(ranges, TimestepRanges) else None


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Remember what some observers have seen; what is returned puts it back."""
    states = [
        (module, {name: _copied(value) for name, value in module.state_dict().items()}, ranges_of(module))
        for module in modules
    ]
    ends = [None if ranges is None else ranges.snapshot() for _, _, ranges in states]

    def restore() -> None:
        for (module, state, ranges), earlier in zip(states, ends, strict=True):
            module.load_state_dict(state)
            if ranges is not None and earlier is not None:
                ranges.restore(earlier)

    return restore


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
