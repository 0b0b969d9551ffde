"""The manifest of an artefact: every field, its type and its bounds, in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from tfmq_fx.artefact.fields import checked, fields_of, identifier, items, parse_json, whole
from tfmq_fx.artefact.graph_json import MOST_GRAPH_BYTES
from tfmq_fx.artefact.layout import FORMAT, FORMAT_VERSION, GRAPH, PREVIOUS, TENSORS
from tfmq_fx.artefact.tensor_file import DTYPES
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ArtefactError
from tfmq_fx.temporal.table import TemporalChoice

__all__ = ["Manifest", "Packed", "StoredFile", "TensorKind"]

MOST_MANIFEST_BYTES = 2**25
MOST_TIMESTEPS, MOST_TENSORS, MOST_AXES = 1_000_000, 200_000, 16
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """A file of the artefact.

    Attributes:
        name: Its name in the folder.
        sha256: Of what is in it.
        bytes: How long it is.
        expanded: How long it is when it is decompressed; None for a file that is not compressed.
    """

    name: str
    sha256: str
    bytes: int
    expanded: int | None = None

    @classmethod
    def from_json(cls, value: Any, what: str, plain: str) -> StoredFile:
        """Check a file's entry; ``plain`` is its usual name.

        Raises:
            ArtefactError: A field is wrong.
        """
        compressed = plain == GRAPH
        entry = fields_of(value, ("name", "sha256", "bytes", *(("expanded",) if compressed else ())), what)
        name, digest = (checked(entry[key], str, f"{what}.{key}") for key in ("name", "sha256"))
        if name not in (plain, PREVIOUS[plain]) or SHA256.fullmatch(digest) is None:
            msg = f"{what} names no file of an artefact and its SHA-256; save the program again"
            raise ArtefactError(msg)
        expanded = whole(entry["expanded"], f"{what}.expanded", 1, MOST_GRAPH_BYTES) if compressed else None
        return cls(name, digest, whole(entry["bytes"], f"{what}.bytes", 1), expanded)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class TensorKind:
    """What a stored tensor is: its shape, and its dtype by name."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def from_json(cls, value: Any, what: str) -> TensorKind:
        """Check an entry ``[shape, dtype]``.

        Raises:
            ArtefactError: It is none.
        """
        entry = items(value, what, 2)
        if len(entry) != 2 or type(entry[1]) is not str or entry[1] not in DTYPES:
            msg = f"{what} is not a shape and a dtype; it was changed, save the program again"
            raise ArtefactError(msg)
        return cls(_shape(entry[0], what), entry[1])

    def to_json(self) -> list[Any]:
        """Plain JSON values."""
        return [list(self.shape), self.dtype]


@dataclass(frozen=True)
class Packed:
    """How an integer weight was packed: the bits of a value, and its shape."""

    bits: int
    shape: tuple[int, ...]

    @classmethod
    def from_json(cls, value: Any, what: str) -> Packed:
        """Check an entry ``{bits, shape}``.

        Raises:
            ArtefactError: A field is wrong.
        """
        entry = fields_of(value, ("bits", "shape"), what)
        shape = _shape(entry["shape"], f"{what}.shape")
        if len(shape) < 2 or 0 in shape:
            msg = f"{what}.shape is {list(shape)}, and a packed weight has two axes or more; save the program again"
            raise ArtefactError(msg)
        return cls(whole(entry["bits"], f"{what}.bits", 1, 7), shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"bits": self.bits, "shape": list(self.shape)}


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says; the names of the fields are those of the file.

    A field that is missing, of another type, out of bounds or unknown makes an artefact invalid: fields come and go
    with :data:`~tfmq_fx.artefact.layout.FORMAT_VERSION`.

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
        fields_of(values, ("format", "format_version", *cls.__dataclass_fields__), "the manifest")
        return cls(
            versions=_texts(values["versions"], "'versions'"),
            config=_config(values["config"]),
            timestep=identifier(values["timestep"], "'timestep'"),
            timesteps=None if values["timesteps"] is None else _timesteps(values["timesteps"]),
            scheduler=checked(values["scheduler"], dict, "'scheduler'"),
            interface=_interface(values["interface"]),
            kept_float=_texts(values["kept_float"], "'kept_float'"),
            temporal_choices=tuple(map(_choice, items(values["temporal_choices"], "'temporal_choices'"))),
            layers=_texts(values["layers"], "'layers'"),
            packed=_entries(values["packed"], "'packed'", Packed.from_json),
            parameters=tuple(
                checked(name, str, "a name in 'parameters'")
                for name in items(values["parameters"], "'parameters'", MOST_TENSORS)
            ),
            tensors=_entries(values["tensors"], "'tensors'", TensorKind.from_json),
            files=_files(values["files"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_json` takes them."""
        return {
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


def _texts(value: Any, what: str) -> dict[str, str]:
    entries: dict[str, Any] = checked(value, dict, what)
    return {name: checked(text, str, f"{what}[{name[:60]!r}]") for name, text in entries.items()}


def _shape(value: Any, what: str) -> tuple[int, ...]:
    shape = tuple(whole(size, what, 0, 2**40) for size in items(value, what, MOST_AXES))
    if math.prod(shape) >= 2**48:
        msg = f"{what} has more numbers than any tensor; do not trust this file"
        raise ArtefactError(msg)
    return shape


def _entries(value: Any, what: str, read: Any) -> dict[str, Any]:
    entries: dict[str, Any] = checked(value, dict, what)
    return {name: read(entry, f"{what}[{name[:60]!r}]") for name, entry in entries.items()}


def _config(value: Any) -> QuantizationConfig:
    values = checked(value, dict, "'config'")
    try:
        config = QuantizationConfig.from_dict(values)
        faithful = config.to_dict() == values
    except Exception as error:
        msg = f"'config' holds a configuration that is not valid: {error}"
        raise ArtefactError(msg) from error
    if not faithful:
        changed = sorted(name for name, found in config.to_dict().items() if values.get(name) != found)
        msg = f"'config' holds a configuration that is not valid: {changed[0]!r} was changed, save the program again"
        raise ArtefactError(msg)
    return config


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


def _choice(value: Any) -> TemporalChoice:
    what = "an entry of 'temporal_choices'"
    entry = fields_of(value, ("layer", "kept", "cached_error", "quantized_error"), what)
    kept = checked(entry["kept"], str, f"'kept' of {what}")
    if kept not in ("cached", "quantized"):
        msg = f"'kept' of {what} is {kept[:60]!r} instead of 'cached' or 'quantized'; save the program again"
        raise ArtefactError(msg)
    cached, quantized = (
        float(checked(entry[name], (float, int), f"{name!r} of {what}")) for name in ("cached_error", "quantized_error")
    )
    return TemporalChoice(checked(entry["layer"], str, f"'layer' of {what}"), kept, cached, quantized)  # type: ignore[arg-type]  # kept is one of the two


def _files(value: Any) -> dict[str, StoredFile]:
    entries = fields_of(value, (TENSORS, GRAPH), "'files'")
    return {name: StoredFile.from_json(entry, f"'files'[{name!r}]", name) for name, entry in entries.items()}
