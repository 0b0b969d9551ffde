"""What the processor's instructions can do, as torch found it out."""

from __future__ import annotations

import torch

__all__ = ["has_amx_tiles", "has_vnni"]


def has_vnni() -> bool:
    """Whether it adds products of bytes into 32 bits in one instruction."""
    return bool(torch.cpu._is_vnni_supported())


def has_amx_tiles() -> bool:
    """Whether it multiplies tiles of bytes."""
    return bool(torch.cpu._is_amx_tile_supported())
