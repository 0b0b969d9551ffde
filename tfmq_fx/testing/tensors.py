"""Shapes and dtypes of tensors, small enough to run thousands of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["TensorSpec", "tensor_specs"]

SIZES = (1, 2, 3, 4, 8)
CHANNELS = (*SIZES, 16)
MAX_ELEMENTS = 4096


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor.

    Attributes:
        shape: The shape.
        dtype: The dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def random(self, seed: int = 0) -> Tensor:
        """Normally distributed values (rounded for integer dtypes), the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator).to(self.dtype)


@st.composite
def tensor_specs(
    draw: st.DrawFn,
    *,
    min_rank: int = 1,
    max_rank: int = 4,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> TensorSpec:
    """Tensors of rank 1 to 4 with at most 4,096 elements.

    Args:
        draw: Given by Hypothesis.
        min_rank: The least rank.
        max_rank: The highest rank.
        dtypes: The dtypes to draw from.
    """
    rank = draw(st.integers(min_rank, max_rank))
    shape: list[int] = []
    for axis in range(rank):
        # Axis 1 holds the channels, which may be more; a size that would make the tensor too large is left out.
        room = MAX_ELEMENTS // max(1, int(torch.Size(shape).numel()))
        fitting = [size for size in (CHANNELS if axis == 1 else SIZES) if size <= room]
        shape.append(draw(st.sampled_from(fitting)))
    return TensorSpec(tuple(shape), draw(st.sampled_from(dtypes)))
