"""The manifest of an artefact: every field, its type and its bounds, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from tfmq_fx.artefact.fields import checked, fields_of, identifier, items, parse_json
from tfmq_fx.artefact.layout import FORMAT, FORMAT_VERSION, GRAPH, TENSORS
from tfmq_fx.artefact.manifest_entries import Packed, StoredFile, TensorKind, fidelity_from_json
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ArtefactError
from tfmq_fx.observers.registry import RecordedObserver
from tfmq_fx.quantization.fidelity import Fidelity
from tfmq_fx.temporal.table import TemporalChoice

__all__ = ["MOST_MANIFEST_BYTES", "Manifest"]

MOST_MANIFEST_BYTES = 2**25
MOST_TIMESTEPS, MOST_TENSORS = 1_000_000, 200_000
#: Fields that older artefacts of the same format lack, and those of programs that nothing is known for.
OPTIONAL = ("fidelity",)


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says; the names of the fields are those of the file.

    A field that is missing, of another type, out of bounds or unknown makes an artefact invalid: fields come and go
    with :data:`~tfmq_fx.artefact.layout.FORMAT_VERSION`, but for :data:`OPTIONAL` ones, which may be missing.

    Attributes:
        versions: Of what wrote it.
        config: What it was quantized with.
        timestep: Name of the timestep input.
        timesteps: The timesteps that it serves.
        scheduler: Configuration of their scheduler.
        interface: What the program was captured with.
        kept_float: Layers that stay float, and why.
        temporal_choices: What ``temporal="auto"`` chose.
        layers: By tensor, the layer that reads it.
        packed: By tensor, how it is packed.
        parameters: The tensors that are parameters.
        tensors: By name, what is in the file of tensors.
        files: By their usual names, the other files.
        fidelity: How far it is from the float model, where that was measured: a field that may be missing.
    """

    versions: dict[str, str]
    config: QuantizationConfig
    timestep: str
    timesteps: tuple[float, ...] | None
    scheduler: dict[str, Any]
    interface: dict[str, Any]
    kept_float: dict[str, str]
    temporal_choices: tuple[TemporalChoice, ...]
    layers: dict[str, str]
    packed: dict[str, Packed]
    parameters: tuple[str, ...]
    tensors: dict[str, TensorKind]
    files: dict[str, StoredFile]
    fidelity: Fidelity | None = None

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read the file.

        Args:
            data: What is in it.
            where: Its path, for the message.

        Raises:
            ArtefactError: It is no manifest of this version, or a field is wrong; the message names the field.
        """
        values = parse_json(data, where, MOST_MANIFEST_BYTES)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            folder = PurePath(where).parent
            msg = f"{folder} is not an artefact of tfmq_fx: its {PurePath(where).name} does not say format {FORMAT!r}"
            raise ArtefactError(msg)
        version = values.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            msg = (
                f"{where} has format version {str(version)[:20]}, this tfmq_fx reads {FORMAT_VERSION}; "
                "save it again with this version"
            )
            raise ArtefactError(msg)
        try:
            return cls.from_json(values)
        except ArtefactError as error:
            msg = f"{where}: {error}"
            raise ArtefactError(msg) from error

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Check every field.

        Raises:
            ArtefactError: A field is wrong; the message names it.
        """
        required = [name for name in cls.__dataclass_fields__ if name not in OPTIONAL]
        fields_of(values, ("format", "format_version", *required), "the manifest", OPTIONAL)
        return cls(
            versions=_string_map(values["versions"], "'versions'"),
            config=_config(values["config"]),
            timestep=identifier(values["timestep"], "'timestep'"),
            timesteps=None if values["timesteps"] is None else _timesteps(values["timesteps"]),
            scheduler=checked(values["scheduler"], dict, "'scheduler'"),
            interface=_interface(values["interface"]),
            kept_float=_string_map(values["kept_float"], "'kept_float'"),
            temporal_choices=tuple(map(_temporal_choice, items(values["temporal_choices"], "'temporal_choices'"))),
            layers=_string_map(values["layers"], "'layers'"),
            packed=_entries(values["packed"], "'packed'", Packed.from_json),
            parameters=tuple(
                checked(name, str, "a name in 'parameters'")
                for name in items(values["parameters"], "'parameters'", MOST_TENSORS)
            ),
            tensors=_entries(values["tensors"], "'tensors'", TensorKind.from_json),
            files=_files(values["files"]),
            fidelity=fidelity_from_json(values["fidelity"], "'fidelity'") if "fidelity" in values else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_json` takes them."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": self.versions,
            "config": self.config.to_dict(),
            "timestep": self.timestep,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "scheduler": self.scheduler,
            "interface": self.interface,
            "kept_float": self.kept_float,
            "temporal_choices": [choice.to_dict() for choice in self.temporal_choices],
            "layers": self.layers,
            "packed": {name: how.to_json() for name, how in self.packed.items()},
            "parameters": list(self.parameters),
            "tensors": {name: kind.to_json() for name, kind in self.tensors.items()},
            "files": {name: file.to_json() for name, file in self.files.items()},
        }
        return values if self.fidelity is None else {**values, "fidelity": self.fidelity.to_dict()}


def _string_map(value: Any, what: str) -> dict[str, str]:
    entries: dict[str, Any] = checked(value, dict, what)
    return {name: checked(text, str, f"{what}[{name[:60]!r}]") for name, text in entries.items()}


def _entries(value: Any, what: str, read: Any) -> dict[str, Any]:
    entries: dict[str, Any] = checked(value, dict, what)
    return {name: read(entry, f"{what}[{name[:60]!r}]") for name, entry in entries.items()}


def _config(value: Any) -> QuantizationConfig:
    values = checked(value, dict, "'config'")
    try:
        config = QuantizationConfig.from_dict({**values, **_recorded(values)})
        unchanged = config.to_dict() == values
    except Exception as error:
        msg = f"'config' holds a configuration that is not valid: {error}"
        raise ArtefactError(msg) from error
    if not unchanged:
        differing = sorted(name for name, value in config.to_dict().items() if values.get(name) != value)
        msg = f"'config' holds a configuration that is not valid: {differing[0]!r} was changed, save the program again"
        raise ArtefactError(msg)
    return config


def _recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The observer of activations by its name alone: the program has its ranges, so it need not be registered here."""
    name = values.get("activation_range")
    return {"activation_range": RecordedObserver(name)} if isinstance(name, str) else {}


def _timesteps(value: Any) -> tuple[float, ...]:
    entries = items(value, "'timesteps'", MOST_TIMESTEPS)
    numbers = [checked(number, (float, int), "a number in 'timesteps'") for number in entries]
    if not numbers or not all(abs(number) < 1e300 for number in numbers):
        msg = "'timesteps' is empty or holds a number that is not finite; save the program again"
        raise ArtefactError(msg)
    return tuple(map(float, numbers))


def _interface(value: Any) -> dict[str, Any]:
    """What the program was captured with."""
    interface: dict[str, Any] = checked(value, dict, "'interface'")
    return interface


def _temporal_choice(value: Any) -> TemporalChoice:
    what = "an entry of 'temporal_choices'"
    entry = fields_of(value, ("layer", "kept", "cached_error", "quantized_error"), what)
    source = checked(entry["kept"], str, f"'kept' of {what}")
    if source not in ("cached", "quantized"):
        msg = f"'kept' of {what} is {source[:60]!r} instead of 'cached' or 'quantized'; save the program again"
        raise ArtefactError(msg)
    cached, quantized = (
        float(checked(entry[name], (float, int), f"{name!r} of {what}")) for name in ("cached_error", "quantized_error")
    )
    kept: Literal["cached", "quantized"] = "cached" if source == "cached" else "quantized"
    return TemporalChoice(checked(entry["layer"], str, f"'layer' of {what}"), kept, cached, quantized)


def _files(value: Any) -> dict[str, StoredFile]:
    entries = fields_of(value, (TENSORS, GRAPH), "'files'")
    return {name: StoredFile.from_json(entry, f"'files'[{name!r}]", name) for name, entry in entries.items()}
