"""What samplers keep, as JSON files: a few values and tables of numbers, each checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError

__all__ = ["TableField", "read_json", "write_json"]


@dataclass(frozen=True)
class TableField:
    """A field that is a tensor.

    Attributes:
        axes: Its sizes; those that are names are the same wherever the name stands.
        dtype: What it becomes.
    """

    axes: tuple[str | int, ...]
    dtype: torch.dtype = torch.float64


def write_json(file: str | Path, values: Mapping[str, Any]) -> Path:
    """Write a JSON file, tensors as lists, and return its path."""
    file = Path(file)
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}
    file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return file


def read_json(file: str | Path, fields: Mapping[str, type | TableField], what: str) -> dict[str, Any]:
    """Read a JSON file that :func:`write_json` wrote.

    Args:
        file: The file.
        fields: What each field has to be; ``float`` takes whole numbers too.
        what: What the file should hold, for the message.

    Raises:
        ConfigError: The file cannot be read, is not JSON, lacks a field, or has one that is something else.
    """
    try:
        values: Any = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{file} does not hold {what}: it cannot be read ({error.strerror})"
        raise ConfigError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{file} does not hold {what}: it is no JSON ({error})"
        raise ConfigError(msg) from error
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, field in fields.items():
        if not isinstance(values, dict) or name not in values:
            msg = f"{file} does not hold {what}: it has no {name!r}"
            raise ConfigError(msg)
        value = _table(values[name], field, sizes) if isinstance(field, TableField) else _value(values[name], field)
        if value is None:
            wanted = f"table of {field.axes}" if isinstance(field, TableField) else field.__name__
            msg = f"{file} does not hold {what}: its {name!r} is no {wanted}"
            raise ConfigError(msg)
        found[name] = value
    return found


def _value(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    return value if type(value) is kind else None


def _table(value: Any, field: TableField, sizes: dict[str, int]) -> Tensor | None:
    """The tensor of a field, where its numbers are finite and its sizes fit those of the fields before."""
    try:
        table = torch.tensor(value, dtype=field.dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    if table.ndim != len(field.axes) or not bool(table.isfinite().all()):
        return None
    wanted = [sizes.setdefault(axis, size) if isinstance(axis, str) else axis
              for axis, size in zip(field.axes, table.shape, strict=True)]  # fmt: skip
    return table if list(table.shape) == wanted else None
