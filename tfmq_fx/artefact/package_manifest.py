"""What a package says of itself: every field, its type and its bounds, in one place.

This much of a package is data, and checked before any of its compiled code is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfmq_fx.artefact.fields import checked, fields_of, identifier, items, parse_json, whole
from tfmq_fx.artefact.machine import Machine
from tfmq_fx.artefact.tensor_file import DTYPES
from tfmq_fx.artefact.tree_specs import check_tree_spec
from tfmq_fx.errors import ArtefactError

__all__ = ["FORMAT", "FORMAT_VERSION", "MOST_BYTES", "PackageManifest"]

FORMAT, FORMAT_VERSION = "tfmq_fx.package", 1
MOST_BYTES = 2**26
MOST_ROWS, MOST_NAMES = 1_000_000, 100_000
#: The fields of a lowering report, and those of its parts.
REPORT = {
    "backend": str, "integer_kernels": int, "eligible": int, "annotated": int, "temporal_layers": int,
    "table_rows": int, "parity_error": float, "parity_floor": float, "conditioning": str, "kernels": str,
}  # fmt: skip
ENTRY = {"name": str, "operator": str, "kernel": str, "reason": str, "eligible": bool}
CHOICE = {"layer": str, "kept": str, "cached_error": float, "quantized_error": float}


@dataclass(frozen=True)
class PackageManifest:
    """What is in a package beside its code.

    Attributes:
        signature: How its programs are called.
        result: The structure of what they return.
        stages: How its programs go together; None when it has one.
        report: What lowering did.
        timesteps: The timesteps that it serves.
        finite: The values of further inputs that its table is indexed by.
        groups: The group of each timestep.
        unknown_timestep: What a timestep outside the table does.
        config: The configuration of the model.
        machine: What it was compiled for.
    """

    signature: dict[str, Any]
    result: str
    stages: dict[str, Any] | None
    report: dict[str, Any]
    timesteps: list[float] | None
    finite: dict[str, list[float]]
    groups: list[int] | None
    unknown_timestep: str
    config: dict[str, Any]
    machine: Machine

    @classmethod
    def from_bytes(cls, data: bytes) -> PackageManifest:
        """Read it.

        Raises:
            ArtefactError: It is none of this version, or a field is wrong; the message names the field.
        """
        values = checked(parse_json(data, "the description of the package", MOST_BYTES), dict, "the description")
        if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
            msg = f"it does not say format {FORMAT!r} of version {FORMAT_VERSION}; compile it again with this version"
            raise ArtefactError(msg)
        return cls.from_json(values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PackageManifest:
        """Check every field.

        Raises:
            ArtefactError: A field is wrong; the message names it.
        """
        fields_of(values, ("format", "format_version", *cls.__dataclass_fields__), "the description")
        check_tree_spec(checked(values["result"], str, "'result'"))
        finite = checked(values["finite"], dict, "'finite'")
        unknown = checked(values["unknown_timestep"], str, "'unknown_timestep'")
        if unknown not in ("error", "nearest"):
            msg = f"'unknown_timestep' is {unknown[:60]!r} instead of 'error' or 'nearest'; compile the package again"
            raise ArtefactError(msg)
        timesteps, groups = values["timesteps"], values["groups"]
        return cls(
            signature=_signature(values["signature"]),
            result=values["result"],
            stages=None if values["stages"] is None else _stages(values["stages"]),
            report=_report(values["report"]),
            timesteps=None if timesteps is None else _numbers(timesteps, "'timesteps'"),
            finite={identifier(name, "a name in 'finite'"): _numbers(row, "'finite'") for name, row in finite.items()},
            groups=None if groups is None else [whole(n, "'groups'") for n in items(groups, "'groups'", MOST_ROWS)],
            unknown_timestep=unknown,
            config=checked(values["config"], dict, "'config'"),
            machine=Machine.from_json(values["machine"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_json` takes them."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "machine": self.machine.to_json()}


def _signature(value: Any) -> dict[str, Any]:
    """How the programs are called."""
    fields = fields_of(value, ("names", "inputs", "spec", "timestep", "max_batch"), "'signature'")
    _names(fields["names"], "'signature'.names")
    check_tree_spec(checked(fields["spec"], str, "'signature'.spec"))
    identifier(fields["timestep"], "'signature'.timestep")
    if fields["max_batch"] is not None:
        whole(fields["max_batch"], "'signature'.max_batch", 1)
    for given in items(fields["inputs"], "'signature'.inputs", MOST_NAMES):
        if given is None:
            continue
        shape, dtype = items(given, "'signature'.inputs", 2) if len(checked(given, list, "'inputs'")) == 2 else ([], "")
        if checked(dtype, str, "a dtype in 'signature'.inputs") not in DTYPES:
            msg = f"'signature'.inputs has the dtype {dtype[:60]!r}, which is none; compile the package again"
            raise ArtefactError(msg)
        for size in items(shape, "a shape in 'signature'.inputs", 16):
            if size is not None:
                whole(size, "a size in 'signature'.inputs")
    return dict(fields)


def _stages(value: Any) -> dict[str, Any]:
    fields = fields_of(value, ("inputs", "stages", "results"), "'stages'")
    _names(fields["inputs"], "'stages'.inputs")
    for name in items(fields["results"], "'stages'.results", MOST_NAMES):
        checked(name, (str, type(None)), "a name in 'stages'.results")
    for stage in items(fields["stages"], "'stages'.stages", 8):
        entry = fields_of(stage, ("inputs", "outputs", "by_row", "timestep"), "a stage")
        _names(entry["inputs"], "the inputs of a stage")
        _names(entry["outputs"], "the outputs of a stage")
        checked(entry["by_row"], bool, "'by_row' of a stage")
        checked(entry["timestep"], (str, type(None)), "'timestep' of a stage")
    return dict(fields)


def _report(value: Any) -> dict[str, Any]:
    fields = fields_of(value, (*REPORT, "measured", "temporal_choices", "entries"), "'report'")
    _typed(fields, REPORT, "'report'")
    items(fields["measured"], "'report'.measured", 0)  # only the choice between backends measures
    for name, kinds in (("temporal_choices", CHOICE), ("entries", ENTRY)):
        for entry in items(fields[name], f"'report'.{name}", MOST_NAMES):
            _typed(fields_of(entry, kinds, f"an entry of 'report'.{name}"), kinds, f"an entry of 'report'.{name}")
    return dict(fields)


def _typed(fields: Mapping[str, Any], kinds: Mapping[str, type], what: str) -> None:
    for name, kind in kinds.items():
        checked(fields[name], (float, int) if kind is float else kind, f"{name!r} of {what}")


def _names(value: Any, what: str) -> None:
    for name in items(value, what, MOST_NAMES):
        identifier(name, f"a name in {what}")


def _numbers(value: Any, what: str) -> list[float]:
    numbers = [checked(number, (float, int), f"a number in {what}") for number in items(value, what, MOST_ROWS)]
    if not all(map(math.isfinite, numbers)):
        msg = f"{what} holds a number that is not finite; compile the package again"
        raise ArtefactError(msg)
    return [float(number) for number in numbers]
