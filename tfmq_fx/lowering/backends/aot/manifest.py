"""What a package says of itself: every field, its type and its bounds, in one place.

This much of a package is data, and checked before any of its compiled code is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tfmq_fx.artefact.fields import checked, fields_of, identifier, items, parse_json, whole
from tfmq_fx.artefact.temporal_program import StoredTemporalProgram
from tfmq_fx.artefact.tree_specs import check_tree_spec, load_tree_spec
from tfmq_fx.config.choices import UnknownTimestep
from tfmq_fx.errors import ArtefactError
from tfmq_fx.frontend.interface_json import interface_from_json
from tfmq_fx.lowering.backends.aot.checksums import read_checksums
from tfmq_fx.lowering.backends.aot.machine import Machine
from tfmq_fx.lowering.report.report import LoweringReport
from tfmq_fx.lowering.stages import Layout

__all__ = ["FORMAT", "FORMAT_VERSION", "MOST_BYTES", "PackageManifest"]

FORMAT, FORMAT_VERSION = "tfmq_fx.package", 3
MOST_BYTES = 2**26
MOST_ROWS, MOST_STAGES = 1_000_000, 8


@dataclass(frozen=True)
class PackageManifest:
    """What is in a package beside its code.

    Attributes:
        interface: How its programs are called.
        timestep: Name of the timestep input.
        result: The structure of what they return.
        stages: How its programs go together; None when it has one.
        temporal: What is said of the temporal program, the first stage; None where the block is compiled.
        report: What lowering did.
        timesteps: The timesteps that it serves.
        finite: The values of further inputs that its table is indexed by.
        groups: The group of each timestep.
        unknown_timestep: What a timestep outside the table does.
        machine: What it was compiled for.
        members: The checksums of the other files, by name.
    """

    interface: dict[str, Any]
    timestep: str
    result: str
    stages: dict[str, Any] | None
    temporal: dict[str, Any] | None
    report: dict[str, Any]
    timesteps: list[float] | None
    finite: dict[str, list[float]]
    groups: list[int] | None
    unknown_timestep: str
    machine: Machine
    members: dict[str, str]

    @classmethod
    def from_bytes(cls, data: bytes) -> PackageManifest:
        """Read it.

        Raises:
            ArtefactError: It is none of this version, or a field is wrong; the message names the field.
        """
        values = checked(parse_json(data, "the description of the package", MOST_BYTES), dict, "the description")
        version = values.get("format_version")
        if values.get("format") != FORMAT or type(version) is not int or version != FORMAT_VERSION:
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
        if unknown not in get_args(UnknownTimestep):
            allowed = " or ".join(map(repr, get_args(UnknownTimestep)))
            msg = f"'unknown_timestep' is {unknown[:60]!r} instead of {allowed}; compile the package again"
            raise ArtefactError(msg)
        timesteps, groups = values["timesteps"], values["groups"]
        return cls(
            interface=_interface(values["interface"]),
            timestep=identifier(values["timestep"], "'timestep'"),
            result=values["result"],
            stages=None if values["stages"] is None else _stages(values["stages"]),
            temporal=_temporal(values["temporal"], values["stages"]),
            report=_report(values["report"]),
            timesteps=None if timesteps is None else _numbers(timesteps, "'timesteps'"),
            finite={
                identifier(name, "a name in 'finite'"): _numbers(column, "'finite'") for name, column in finite.items()
            },
            groups=None if groups is None else [whole(n, "'groups'") for n in items(groups, "'groups'", MOST_ROWS)],
            unknown_timestep=unknown,
            machine=Machine.from_json(values["machine"]),
            members=read_checksums(values["members"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as :meth:`from_json` takes them."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "machine": self.machine.to_json()}


def _interface(value: Any) -> dict[str, Any]:
    """How the programs are called."""
    interface_from_json(value, load_tree_spec)
    return dict(value)


def _stages(value: Any) -> dict[str, Any]:
    """How the programs go together: names of values, and little else."""
    fields = _check_round_trip(checked(value, dict, "'stages'"), "'stages'", Layout)
    for name in filter(None, (*fields["inputs"], *fields["results"])):
        identifier(name, "a name in 'stages'")
    for stage in items(fields["stages"], "'stages'.stages", MOST_STAGES):
        for name in (*stage["inputs"], *stage["outputs"]):
            identifier(name, "a name in a stage")
    return fields


def _temporal(value: Any, stages: Any) -> dict[str, Any] | None:
    """What is said of the temporal program, which the first stage must be."""
    if value is None:
        return None
    stored = StoredTemporalProgram.from_json(value)
    first = next(iter(Layout.from_dict(stages).stages), None) if stages is not None else None
    if first is None or first.outputs != tuple(entry.name for entry in stored.inputs):
        msg = "'temporal' does not compute what the first of the 'stages' returns; compile the package again"
        raise ArtefactError(msg)
    return stored.to_json()


def _report(value: Any) -> dict[str, Any]:
    """What lowering did; nothing but a reader's eyes depends on it."""
    return _check_round_trip(checked(value, dict, "'report'"), "'report'", LoweringReport)


def _check_round_trip(value: dict[str, Any], what: str, kind: type[Layout] | type[LoweringReport]) -> dict[str, Any]:
    """``value``, which is what this object writes of itself."""
    try:
        read = kind.from_dict(value)
        str(read)
        written: dict[str, Any] = json.loads(json.dumps(read.to_dict()))
    except Exception as error:
        msg = f"{what} is not what this version writes ({type(error).__name__}); compile the package again"
        raise ArtefactError(msg) from error
    if json.dumps(written, sort_keys=True) != json.dumps(value, sort_keys=True):
        msg = f"{what} is not what this version writes; compile the package again"
        raise ArtefactError(msg)
    return written


def _numbers(value: Any, what: str) -> list[float]:
    numbers = [checked(number, (float, int), f"a number in {what}") for number in items(value, what, MOST_ROWS)]
    if not all(map(math.isfinite, numbers)):
        msg = f"{what} holds a number that is not finite; compile the package again"
        raise ArtefactError(msg)
    return [float(number) for number in numbers]
