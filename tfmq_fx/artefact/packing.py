"""Pack integer weights of less than 8 bits: lossless, to the width that each tensor needs.

A ``b``-bit weight with its zero point folded in spans at most ``2^b`` consecutive integers per channel,
so ``q - min`` fits in ``b`` bits; the minimum of each channel is kept beside it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.errors import ArtefactError

__all__ = ["needed_bits", "pack", "unpack"]


def _by_channel(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1).to(torch.int16)


def needed_bits(tensor: Tensor) -> int:
    """The smallest width that holds ``tensor - min`` for every channel (axis 0); 8 when it saves nothing."""
    if tensor.dtype != torch.int8 or tensor.ndim < 2 or tensor.numel() == 0:
        return 8
    channels = _by_channel(tensor)
    spread = int((channels.amax(1) - channels.amin(1)).max())
    return min(8, max(1, spread.bit_length()))


def pack(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack an int8 tensor ``[C, ...]`` to ``bits`` bits a value.

    Returns:
        The bit string (uint8, ``[ceil(numel * bits / 8)]``) and the minimum per channel (int8, ``[C]``).
    """
    channels = _by_channel(tensor)
    lowest = channels.amin(1)
    values = (channels - lowest[:, None]).reshape(-1).to(torch.uint8).numpy()
    planes = np.unpackbits(values[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes.reshape(-1))), lowest.to(torch.int8)


def unpack(packed: Tensor, lowest: Tensor, bits: int, shape: list[int]) -> Tensor:
    """The inverse of :func:`pack`: int8 of ``shape``.

    Raises:
        ArtefactError: The tensors are not what packing such a shape to so many bits gives.
    """
    count = math.prod(shape)
    sizes = [list(packed.shape), list(lowest.shape)]
    if sizes != [[-(-count * bits // 8)], shape[:1]] or packed.dtype != torch.uint8 or lowest.dtype != torch.int8:
        msg = f"a packed weight of {sizes[0]} bytes and {sizes[1]} minima is not {shape} of {bits} bits; save it again"
        raise ArtefactError(msg)
    planes = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    padded = np.zeros((count, 8), np.uint8)
    padded[:, 8 - bits :] = planes
    values = torch.from_numpy(np.packbits(padded, axis=1).reshape(shape[0], -1)).to(torch.int16)
    return (values + lowest.to(torch.int16)[:, None]).to(torch.int8).reshape(shape)
