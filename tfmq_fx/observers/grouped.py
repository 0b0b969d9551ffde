"""Observers of activations by timestep group: one scale and zero point per group, called as ``observer(x, groups)``.

The ranges are those of ``activation.py``, group by group. Sources: timestep-grouped activation quantization, ADP-DM
(arXiv 2305.18723); with one timestep per group, TDQ (NeurIPS 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tfmq_fx.errors import CalibrationError
from tfmq_fx.observers.activation import HISTOGRAM_BINS, MOMENTUM
from tfmq_fx.observers.channel_statistics import ChannelStatistics
from tfmq_fx.observers.contract import CheckedObserver
from tfmq_fx.observers.finite import input_of, require_finite
from tfmq_fx.observers.gathered import convert_gathered
from tfmq_fx.observers.ranges import asymmetric_parameters, search_asymmetric
from tfmq_fx.observers.timestep_ranges import TimestepRanges, smoothed

__all__ = ["GroupedEMAObserver", "GroupedMSEObserver", "GroupedMinMaxObserver", "GroupedObserver", "nearest_seen",
           "pooled"]  # fmt: skip


def nearest_seen(seen: Tensor) -> Tensor:
    """For each group the nearest one that was seen, the lower of two; ``seen`` has one True at least."""
    index = torch.arange(len(seen), device=seen.device)
    distance = 2 * (index[:, None] - index[None]).abs() + (index[None] > index[:, None]).long()
    return distance.masked_fill(~seen[None], 2 * len(seen)).argmin(dim=1)


def pooled(low: Tensor, high: Tensor, items: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """For each group the union of the ranges of the nearest ones, itself first, that have ``least`` items together.

    Groups without items have no range and take part in none.

    Args:
        low: ``[G]``.
        high: ``[G]``.
        items: Items of each, int64 ``[G]``.
        least: How many are enough; where all have fewer, all are taken.
    """
    count = len(low)
    before = [0, *items.cumsum(0).tolist()]
    low, high = low.where(items > 0, torch.inf), high.where(items > 0, -torch.inf)
    ends = []
    for group in range(count):
        reach = next(
            (
                reach
                for reach in range(count)
                if before[min(count, group + reach + 1)] - before[max(0, group - reach)] >= least
            ),
            count,
        )
        around = slice(max(0, group - reach), group + reach + 1)
        ends.append((low[around].amin(), high[around].amax()))
    lows, highs = zip(*ends, strict=True)
    return torch.stack(lows), torch.stack(highs)


class GroupedObserver(CheckedObserver):
    """The base of observers with one range per timestep group: ranges per item and group, and the step to parameters.

    A subclass implements :meth:`observe`.

    Args:
        groups: Number of groups ``G``.
        bits: Width, 2 to 8 or 16.
        subject: What the activation is called in errors.
    """

    def __init__(self, groups: int, bits: int, subject: str = input_of("")) -> None:
        super().__init__(torch.uint8 if bits <= 8 else torch.int32)
        self.subject = subject
        self.quant_min, self.quant_max, self.qscheme = 0, 2**bits - 1, torch.per_tensor_affine
        self.register_buffer("low", torch.zeros(groups))
        self.register_buffer("high", torch.zeros(groups))
        #: Batches in which each group occurred, and its items in all of them.
        self.register_buffer("batches", torch.zeros(groups, dtype=torch.int64))
        self.register_buffer("items", torch.zeros(groups, dtype=torch.int64))
        self.least_items, self.entries_per_item = 1, 1
        #: What each channel spans, where somebody wants to know.
        self.channels: ChannelStatistics | None = None
        self.low: Tensor
        self.high: Tensor
        self.batches: Tensor
        self.items: Tensor

    def pool_groups(self, least_items: int, entries_per_item: int = 1) -> None:
        """Let groups with fewer items share the ranges of their neighbours.

        Args:
            least_items: How many items a range is to be of. With 1 a group that was observed stands for itself.
            entries_per_item: Entries that an item has along the first axis of what is observed.
        """
        self.least_items, self.entries_per_item = least_items, entries_per_item

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        """Observe ``x`` (``[N, ...]``, float) under the groups of its entries (int64, ``[N]``) and return it."""
        if x.numel():
            values = x.detach().to(torch.float32).flatten(1)
            low, high = values.amin(1), values.amax(1)  # aminmax along an axis is several times slower
            require_finite(low, high, x, self.subject)
            size = len(self.low)
            low = torch.full((size,), torch.inf).to(low).scatter_reduce(0, groups, low, "amin")
            high = torch.full((size,), -torch.inf).to(high).scatter_reduce(0, groups, high, "amax")
            present = low <= high
            if self.channels is not None:
                self.channels.add(x, groups)
            self.observe(values, groups, present, low, high)
            self.batches += present
            self.items += torch.bincount(groups, minlength=size) // self.entries_per_item
        return x

    def observe(self, values: Tensor, groups: Tensor, present: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in a batch.

        Args:
            values: ``[N, n]``, float32.
            groups: ``[N]``.
            present: Which groups occur, ``[G]``.
            low: Their smallest values, ``[G]``; what absent groups have is infinite.
            high: Their largest values, ``[G]``.
        """
        raise NotImplementedError

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The ranges ``(lo, hi)``, each ``[G]``; those of groups that were never observed mean nothing."""
        return self.low, self.high

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points (int64), each ``[G]``.

        A group without observations takes the range of the nearest one that has some, in the order of noise; one with
        few, the union of the nearest ones that have enough together (:meth:`pool_groups`).

        Raises:
            CalibrationError: Nothing was observed, or the observer's ranges are none.
        """
        seen = self.batches > 0
        if not bool(seen.any()):
            msg = "an activation was never observed; calibrate with at least one batch before converting"
            raise CalibrationError(msg)
        low, high = self.checked_ends(self.observed_ranges(), len(seen))
        if self.least_items > 1:
            low, high = pooled(low, high, self.items.where(seen, 0), self.least_items)
        else:
            nearest = nearest_seen(seen)
            low, high = low[nearest], high[nearest]
        self.require_ranges(low, high)
        return asymmetric_parameters(low, high, self.quant_min, self.quant_max)

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Replace ``node`` by quantize and dequantize with gathered parameters (called by ``convert_pt2e``)."""
        convert_gathered(self, model, node)


class GroupedMinMaxObserver(GroupedObserver):
    """Minimum and maximum of each group over all batches together."""

    def observe(self, values: Tensor, groups: Tensor, present: Tensor, low: Tensor, high: Tensor) -> None:
        """Merge the ranges."""
        self.low = torch.minimum(self.low, low)
        self.high = torch.maximum(self.high, high)


class GroupedEMAObserver(GroupedObserver):
    """Minimum and maximum of each group, smoothed over the batches in which it occurs (:class:`EMAMinMaxObserver`).

    In :func:`tfmq_fx.calibrate` over its timesteps, as there.
    """

    def __init__(self, groups: int, bits: int, subject: str = input_of(""), momentum: float = MOMENTUM) -> None:
        super().__init__(groups, bits, subject)
        self.momentum, self.ranges = momentum, TimestepRanges()
        #: Ranges that were smoothed for each group outside of a calibration.
        self.register_buffer("steps", torch.zeros(groups, dtype=torch.int64))
        self.steps: Tensor

    def observe(self, values: Tensor, groups: Tensor, present: Tensor, low: Tensor, high: Tensor) -> None:
        """Move the ranges of the groups that occur."""
        if self.ranges.items is not None:
            self.ranges.add(low, high)
        else:
            self.low, self.high, self.steps = self._step((self.low, self.high, self.steps), low, high)

    def _step(self, state: tuple[Tensor, Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        present = low <= high
        new_low = torch.where(present, smoothed(state[0], low, self.momentum), state[0])
        new_high = torch.where(present, smoothed(state[1], high, self.momentum), state[1])
        return new_low, new_high, state[2] + present

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The corrected running ranges."""
        state = (self.low, self.high, self.steps)
        for low, high in self.ranges.by_bucket():
            state = self._step(state, low, high)
        correction = (1 - self.momentum ** state[2].double()).to(self.low)
        return state[0] / correction, state[1] / correction


class GroupedMSEObserver(GroupedObserver):
    """The range of each group that quantizes its values best in the 2.4 norm (:class:`MSEObserver`).

    Keeps a histogram per group: 16 KiB each.
    """

    def __init__(self, groups: int, bits: int, subject: str = input_of("")) -> None:
        super().__init__(groups, bits, subject)
        self.register_buffer("counts", torch.zeros(groups, HISTOGRAM_BINS, dtype=torch.float64))
        self.counts: Tensor

    def _centres(self) -> Tensor:
        width = (self.high - self.low) / HISTOGRAM_BINS
        steps = torch.arange(HISTOGRAM_BINS, device=width.device) + 0.5
        return self.low[:, None] + width[:, None] * steps

    def _bins(self, values: Tensor, groups: Tensor) -> Tensor:
        """The bin of each value, ``[N, n]``, in the histogram of its entry's group."""
        width = (self.high - self.low).clamp_min(torch.finfo(torch.float32).tiny)[groups, None]
        return ((values - self.low[groups, None]) / width * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)

    def observe(self, values: Tensor, groups: Tensor, present: Tensor, low: Tensor, high: Tensor) -> None:
        """Widen the histograms where needed, then count."""
        low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if not (torch.equal(low, self.low) and torch.equal(high, self.high)):
            centres, every = self._centres(), torch.arange(len(low), device=low.device)
            self.low, self.high = low, high
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, self._bins(centres, every), self.counts)
        places = self._bins(values, groups) + groups[:, None] * HISTOGRAM_BINS
        self.counts += torch.bincount(places.reshape(-1), minlength=self.counts.numel()).reshape(self.counts.shape)

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The best shrink of each observed range."""
        weights = self.counts.to(torch.float32)
        return search_asymmetric(self._centres(), self.low, self.high, self.quant_min, self.quant_max, weights=weights)
