"""Tensors as strict JSON and back: lists of numbers, and what JSON has no number for as a string."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["number", "numbers", "tensor"]


def number(value: float) -> float | str:
    """A float as JSON keeps it: ``"inf"``, ``"-inf"`` and ``"nan"`` are strings, which ``float`` reads."""
    return value if math.isfinite(value) else str(value)


def numbers(values: Tensor) -> list[Any]:
    """A float64 tensor of at least one axis as nested lists."""
    return [number(value.item()) if value.ndim == 0 else numbers(value) for value in values.double().cpu()]


def tensor(values: list[Any]) -> Tensor:
    """The inverse of :func:`numbers`: float64."""
    return torch.tensor(_floats(values), dtype=torch.float64)


def _floats(values: list[Any]) -> list[Any]:
    return [_floats(value) if isinstance(value, list) else float(value) for value in values]
