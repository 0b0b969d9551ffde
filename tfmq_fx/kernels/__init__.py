"""Our own integer kernels for x86 with AVX-512 VNNI: C++ headers, operators that name them, and how they compile."""

from __future__ import annotations

from tfmq_fx.kernels.checks import (
    MAX_BYTE_PRODUCTS,
    MAX_SIGNED_PRODUCTS,
    MAX_TAPS,
    MOST_WORD,
    has_native_kernels,
    weights_fit,
)
from tfmq_fx.kernels.packing import block_columns, pack_weight, unpack_weight
from tfmq_fx.kernels.pointwise import OPERATORS

__all__ = [
    "MAX_BYTE_PRODUCTS",
    "MAX_SIGNED_PRODUCTS",
    "MAX_TAPS",
    "MOST_WORD",
    "OPERATORS",
    "block_columns",
    "has_native_kernels",
    "pack_weight",
    "unpack_weight",
    "weights_fit",
]
