"""The entries of a manifest: a file, a tensor, and how a weight was packed, each with its checks."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from tfmq_fx.artefact.fields import checked, fields_of, items, whole
from tfmq_fx.artefact.graph_json import MOST_GRAPH_BYTES
from tfmq_fx.artefact.layout import GRAPH, PREVIOUS
from tfmq_fx.artefact.tensor_file import DTYPES
from tfmq_fx.errors import ArtefactError
from tfmq_fx.quantization.fidelity import Fidelity, TimestepFidelity

__all__ = ["Packed", "StoredFile", "TensorKind", "fidelity_from_json"]

MOST_AXES = 16
#: Timesteps that fidelity is said of, and what a norm may be: the sum of its square does not overflow.
MOST_MEASURED, LARGEST_NORM = 1000, 1e150
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


def fidelity_from_json(value: Any, what: str) -> Fidelity:
    """What is known of a program's distance from its float model.

    Raises:
        ArtefactError: A field is wrong, or a timestep comes twice.
    """
    entries = items(fields_of(value, ("timesteps",), what)["timesteps"], f"{what}.timesteps", MOST_MEASURED)
    measured = tuple(_timestep_fidelity(entry, f"an entry of {what}.timesteps") for entry in entries)
    if not measured or len({entry.timestep for entry in measured}) < len(measured):
        msg = f"{what}.timesteps is empty or has a timestep twice; it was changed, save the program again"
        raise ArtefactError(msg)
    return Fidelity(measured)


def _timestep_fidelity(value: Any, what: str) -> TimestepFidelity:
    entry = fields_of(value, ("timestep", "signal", "difference", "peak", "numbers"), what)
    timestep, difference = entry["timestep"], entry["difference"]
    return TimestepFidelity(
        timestep=None if timestep is None else _finite(timestep, f"'timestep' of {what}", -LARGEST_NORM),
        signal=_finite(entry["signal"], f"'signal' of {what}"),
        difference=math.inf if difference is None else _finite(difference, f"'difference' of {what}"),
        peak=_finite(entry["peak"], f"'peak' of {what}"),
        numbers=whole(entry["numbers"], f"'numbers' of {what}", 1),
    )


def _finite(value: Any, what: str, least: float = 0.0) -> float:
    if not least <= checked(value, (float, int), what) <= LARGEST_NORM:
        bounds = f"{least:g} to {LARGEST_NORM:g}"
        msg = f"{what} is {str(value)[:60]}, outside {bounds}; it was changed, save the program again"
        raise ArtefactError(msg)
    return float(value)


def _shape(value: Any, what: str) -> tuple[int, ...]:
    shape = tuple(whole(size, what, 0, 2**40) for size in items(value, what, MOST_AXES))
    if math.prod(shape) >= 2**48:
        msg = f"{what} has more numbers than any tensor; do not trust this file"
        raise ArtefactError(msg)
    return shape
