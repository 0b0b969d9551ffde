"""What the channels of an activation span, timestep by timestep: which of them do not share a range with the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MOST_ROWS", "ChannelStatistics"]

#: Timestep groups are taken together in so many rows: a row holds three numbers a channel.
MOST_ROWS = 64


class ChannelStatistics(nn.Module):
    """Smallest value, largest value and mean square of each channel, by rows of neighbouring timestep groups.

    Args:
        groups: Number of timestep groups ``G``.
        channels: Number of channels ``C``.
        axis: The channels' axis: 1 of an image, the last of what a linear reads.

    Attributes:
        low: ``[R, C]``, at most 0, with ``R = min(G, MOST_ROWS)``.
        high: ``[R, C]``, at least 0.
        squares: Sums of squares, float64 ``[R, C]``.
        values: How many values of a channel each row has seen, int64 ``[R]``.
    """

    def __init__(self, groups: int, channels: int, axis: int) -> None:
        super().__init__()
        self.groups, self.axis = groups, axis
        rows = min(groups, MOST_ROWS)
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(rows, channels))
        self.register_buffer("squares", torch.zeros(rows, channels, dtype=torch.float64))
        self.register_buffer("values", torch.zeros(rows, dtype=torch.int64))
        self.low: Tensor
        self.high: Tensor
        self.squares: Tensor
        self.values: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of each group, int64 ``[G]``."""
        return torch.arange(self.groups) * len(self.low) // self.groups

    def add(self, x: Tensor, groups: Tensor) -> None:
        """Take in ``x`` (``[N, ...]``, float) of the ``groups`` of its entries (int64 ``[N]``)."""
        moved = x.detach().to(torch.float32).movedim(self.axis, 1)
        entries = moved.reshape(*moved.shape[:2], -1)
        rows = self.rows.to(groups.device)[groups]
        present = torch.bincount(rows).nonzero()[:, 0].tolist()
        for row in present:
            of_row = entries if len(present) == 1 else entries[rows == row]
            # Each by itself: torch's aminmax along an axis is several times slower than both of its halves.
            low, high = of_row.amin((0, 2)), of_row.amax((0, 2))
            self.low[row] = torch.minimum(self.low[row], low)
            self.high[row] = torch.maximum(self.high[row], high)
            self.squares[row] += _squares(of_row)
            self.values[row] += of_row.shape[0] * of_row.shape[2]


def _squares(entries: Tensor) -> Tensor:
    """Sums of squares of the channels of ``[N, C, n]``, float64 ``[C]``: in float32 along the rows of memory alone."""
    if entries.shape[2] == 1:
        return entries[..., 0].square().sum(0).double()
    norms: Tensor = torch.linalg.vector_norm(entries, dim=2)
    return norms.double().square().sum(0)
