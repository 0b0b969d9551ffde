"""The order in which the integer kernels read a weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["block_columns", "pack_weight", "unpack_weight"]

#: Signed bytes that one lane sums, and lanes of a vector register.
DEPTH, LANES = 4, 16


def block_columns(channels: int) -> int:
    """Output channels of one block: 64, 48, 32 or 16, whichever is the largest to divide ``channels``; 0 for none."""
    return next((size for size in (64, 48, 32, 16) if channels % size == 0), 0)


def pack_weight(weight: Tensor) -> Tensor:
    """Reorder an int8 weight ``[K, C, *kernel]`` to ``[blocks, taps, C / 4, columns, 4]``.

    A step of the kernel multiplies four neighbouring input channels of a pixel by those of all columns of a block, so
    these lie together. ``C`` is a multiple of 4 and ``K`` of 16.
    """
    channels, depth = weight.shape[:2]
    columns = block_columns(channels)
    blocks = weight.reshape(channels // columns, columns, depth // DEPTH, DEPTH, -1)
    return blocks.permute(0, 4, 2, 1, 3).contiguous()


def unpack_weight(packed: Tensor, depth: int, kernel: Sequence[int]) -> Tensor:
    """The inverse of :func:`pack_weight`, as ``[K, C, height, width]``."""
    blocks, _, _, columns, _ = packed.shape
    return packed.permute(0, 3, 2, 4, 1).reshape(blocks * columns, depth, *kernel)
