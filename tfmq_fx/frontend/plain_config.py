"""A model's configuration as plain JSON values, normalized once, at capture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["plain_config"]


def plain_config(model: Any) -> dict[str, Any]:
    """The ``config`` of a diffusers model as JSON values; empty for a model without one.

    Paths (``from_pretrained`` leaves one in ``_name_or_path``), dtypes and other objects become their text, tuples
    become lists, as they do in diffusers' own files.
    """
    config = getattr(model, "config", None)
    return _plain(config) if isinstance(config, Mapping) else {}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    item = getattr(value, "item", None)  # numbers of numpy and torch
    if callable(item) and getattr(value, "ndim", 1) == 0:
        return _plain(item())
    return str(value)
