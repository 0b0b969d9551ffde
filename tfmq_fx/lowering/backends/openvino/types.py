"""OpenVINO's element types by dtype."""

from __future__ import annotations

from typing import Any

import torch
from openvino import Type

__all__ = ["element_type"]

TYPES = {
    torch.float32: Type.f32,
    torch.float64: Type.f64,
    torch.float16: Type.f16,
    torch.bfloat16: Type.bf16,
    torch.int64: Type.i64,
    torch.int32: Type.i32,
    torch.int16: Type.i16,
    torch.int8: Type.i8,
    torch.uint8: Type.u8,
    torch.bool: Type.boolean,
}


def element_type(dtype: torch.dtype) -> Any:
    """OpenVINO's element type of a dtype."""
    return TYPES[dtype]
