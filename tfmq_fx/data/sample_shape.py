"""The shape of a model's sample, read off its diffusers configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfmq_fx.errors import ConfigError

__all__ = ["sample_shape"]


def sample_shape(config: Mapping[str, Any] | None, model: str) -> tuple[int, ...]:
    """Shape of one sample, ``(channels, height, width)``.

    Args:
        config: The diffusers configuration: ``in_channels``, and ``sample_size`` as a side or a pair.
        model: Name of the model, for the message.

    Raises:
        ConfigError: There is no configuration, or it lacks one of the two.
    """
    config = config or {}
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        msg = f"{model} has no config with in_channels and sample_size; pass shape=(channels, height, width)"
        raise ConfigError(msg)
    return (int(channels), *((size, size) if isinstance(size, int) else map(int, size)))
