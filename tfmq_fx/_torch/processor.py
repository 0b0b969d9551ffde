"""What the processor's instructions can do, as torch found it out."""

from __future__ import annotations

import platform

import torch

__all__ = ["has_amx_tiles", "has_vnni", "sums_bytes_exactly"]


def has_vnni() -> bool:
    """Whether it adds products of bytes into 32 bits in one instruction."""
    return bool(torch.cpu._is_vnni_supported())


def sums_bytes_exactly() -> bool:
    """Whether engines' integer kernels are exact here: on x86 without VNNI a sum of two products can saturate."""
    return platform.machine() not in ("x86_64", "AMD64") or has_vnni()


def has_amx_tiles() -> bool:
    """Whether it multiplies tiles of bytes."""
    return bool(torch.cpu._is_amx_tile_supported())
