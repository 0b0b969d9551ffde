"""What a preset is: the fields of a configuration, and what a method needs beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tfmq_fx.config.checks import plain
from tfmq_fx.config.frozen_mapping import FrozenMapping, freeze

__all__ = ["Preset"]


@dataclass(frozen=True)
class Preset:
    """A published method.

    Attributes:
        name: What :meth:`tfmq_fx.QuantizationConfig.preset` is asked for.
        source: Where the method is from.
        summary: What sets it apart.
        fields: Fields of the configuration that differ from their defaults.
        sampler: How calibration timesteps are drawn: the ``sampler`` of :func:`tfmq_fx.sample_trajectories`.
        corrects_noise: Whether its sampler is wrapped in a :class:`tfmq_fx.schedulers.PTQDScheduler`.
        quantizes_sample: Whether its sampler is wrapped in a :class:`tfmq_fx.schedulers.QuantizedSampleScheduler`.
        limitations: What of the method these passes do not do; empty when nothing is known.
    """

    name: str
    source: str
    summary: str
    fields: Mapping[str, Any] = field(default_factory=FrozenMapping)
    sampler: str = "uniform"
    corrects_noise: bool = False
    quantizes_sample: bool = False
    limitations: str = ""

    def __post_init__(self) -> None:
        """Make the fields read-only."""
        object.__setattr__(self, "fields", freeze(self.fields))

    def with_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with ``values`` on top; layers with widths of their own do not get fewer bits than the others."""
        fields = {**self.fields, **values}
        if "overrides" not in values and "overrides" in fields:
            fields["overrides"] = {
                entry: {name: _wider(name, value, values.get(name)) for name, value in own.items()}
                for entry, own in fields["overrides"].items()
            }
        return fields


def _wider(name: str, own: Any, given: Any) -> Any:
    """The larger one of two widths; another field is the override's own, and what is no width fails in its check."""
    given = plain(given)
    return max(own, given) if name.endswith("_bits") and isinstance(given, int) else own
