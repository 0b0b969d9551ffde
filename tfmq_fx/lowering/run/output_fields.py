"""A model's output as the tuple that diffusers' models return with ``return_dict=False``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fields_of"]


def fields_of(output: Any) -> tuple[Any, ...]:
    """The fields of an output class, in its order; a field may hold a list of tensors, and stays one."""
    if isinstance(output, Mapping):
        return tuple(output.values())
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)
