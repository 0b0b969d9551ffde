"""Values that layers read as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq_fx.lowering.backends.onnxruntime.graph import Value

__all__ = ["INTEGERS", "IntegerActivation", "IntegerWeight"]

INTEGERS = (torch.uint8, torch.int8)


@dataclass(frozen=True, eq=False)
class IntegerActivation:
    """An activation in integers; what cannot read those reads :attr:`real`, which is made when it is asked for."""

    integers: Value
    scale: float
    zero_point: Value


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight in integers with zero point 0 and a scale per entry of one axis."""

    integers: Tensor
    scales: Tensor
    axis: int

    @property
    def real(self) -> Tensor:
        """The weight in float."""
        along = [1] * self.integers.ndim
        along[self.axis] = -1
        return self.integers.float() * self.scales.reshape(along)
