"""Configurations as files: what ``search`` writes and ``quantize --config`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from tfmq_fx.config.quantization import QuantizationConfig

__all__ = ["read_configuration", "write_configuration"]


def read_configuration(path: Path) -> QuantizationConfig:
    """The configuration that a JSON file holds: the fields of ``QuantizationConfig``, of which any may be left out.

    Raises:
        ConfigError: There is no such file, it is no JSON, or its fields are not valid.
    """
    from tfmq_fx.config.quantization import QuantizationConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"the configuration {path} cannot be read: {error.strerror}"
        raise ConfigError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"the configuration {path} is no JSON: {error}"
        raise ConfigError(msg) from error
    return QuantizationConfig.from_dict(values)


def write_configuration(config: QuantizationConfig, path: Path) -> None:
    """Write a configuration that :func:`read_configuration` reads."""
    path.write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
