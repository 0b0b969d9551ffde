"""A diagnosis: everything that was measured about one quantized program, as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from tfmq_fx.diagnostics.features import TemporalFeatureError
from tfmq_fx.diagnostics.layer_error import LayerErrors
from tfmq_fx.diagnostics.mismatch import TemporalMismatch
from tfmq_fx.diagnostics.tables import as_text, diagnosis_tables
from tfmq_fx.diagnostics.trajectory import TrajectoryDeviation
from tfmq_fx.errors import ConfigError

__all__ = ["Diagnosis"]

SECTIONS: dict[str, Any] = {
    "features": TemporalFeatureError,
    "mismatch": TemporalMismatch,
    "nearest": TemporalMismatch,
    "trajectory": TrajectoryDeviation,
    "temporal_trajectory": TrajectoryDeviation,
    "layers": LayerErrors,
    "local_layers": LayerErrors,
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a quantized program lost, and where. A section that could not be measured is None.

    Attributes:
        label: The program's name in tables and pictures.
        config: Its configuration, as JSON values.
        features: Temporal feature error (the paper's cosine) and relative feature error per timestep and layer.
        mismatch: Which timestep each feature is taken for, by cosine as in TFMQ-DM.
        nearest: The same by Euclidean distance.
        trajectory: Deviation of the quantized denoiser from the float one, step by step.
        temporal_trajectory: The same with the temporal block alone quantized, the rest in float.
        layers: Error of every weighted layer as the net runs.
        local_layers: Error of every weighted layer on float inputs.
        skipped: Why a section is None, by its name.
    """

    label: str
    config: Mapping[str, Any] = field(default_factory=dict)
    features: TemporalFeatureError | None = None
    mismatch: TemporalMismatch | None = None
    nearest: TemporalMismatch | None = None
    trajectory: TrajectoryDeviation | None = None
    temporal_trajectory: TrajectoryDeviation | None = None
    layers: LayerErrors | None = None
    local_layers: LayerErrors | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that JSON does not have (infinities) are strings."""
        sections = {name: getattr(self, name) for name in SECTIONS}
        return {
            "label": self.label,
            "config": dict(self.config),
            **{name: None if section is None else section.to_dict() for name, section in sections.items()},
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Diagnosis:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: The values are not those of a diagnosis.
        """
        try:
            sections = {
                name: None if values[name] is None else section.from_dict(values[name])
                for name, section in SECTIONS.items()
            }
            return cls(values["label"], dict(values["config"]), **sections, skipped=dict(values["skipped"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"these values are not those of a diagnosis: {type(error).__name__} {error}"
            raise ConfigError(msg) from error

    def to_json(self) -> str:
        """:meth:`to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: The text is not JSON, or not that of a diagnosis.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            msg = f"the text is not JSON: {error}"
            raise ConfigError(msg) from error
        return cls.from_dict(values)

    def tables(self) -> list[Table]:
        """The summary, and the layers that lost most, as rich tables."""
        return diagnosis_tables(self)

    def __str__(self) -> str:
        """The tables as plain text."""
        return as_text(self.tables())
