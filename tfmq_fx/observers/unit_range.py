"""The observer of what lies between 0 and 1 by its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq_fx.observers.activation import PerTensorObserver

__all__ = ["UnitRangeObserver"]


class UnitRangeObserver(PerTensorObserver):
    """The range ``[0, 1]``, whatever comes: of the numerators of a softmax, the largest of which is 1 exactly.

    It refuses NaN and infinite values as other observers do; there is nothing else that it learns.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Check that ``x`` (any shape, float) is finite and return it."""
        if x.numel():
            self.range_of(x.detach())
        return x

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """0 and 1, each of shape ``[1]``."""
        return torch.zeros(1), torch.ones(1)
