"""Hold the layers that were expected on integer kernels against the kernels that there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tfmq_fx.lowering.report.reasons import MISSED, NO_MATMUL
from tfmq_fx.lowering.report.report import ReportEntry

__all__ = [
    "IntegerKernels",
    "KernelsByModule",
    "KernelsByNode",
    "NoKernels",
    "in_float",
    "match_kernels",
    "read_kernels",
]


class IntegerKernels(Protocol):
    """What is known of the integer kernels of a compiled program."""

    def match(self, entries: Sequence[ReportEntry], nodes: Sequence[str]) -> tuple[ReportEntry, ...]:
        """The entries as they were compiled.

        Args:
            entries: What was expected of each layer.
            nodes: The names of their nodes.
        """


@dataclass(frozen=True)
class KernelsByModule:
    """How many there are by module path, as Inductor's finished graph has them."""

    counts: Counter[str]

    def match(self, entries: Sequence[ReportEntry], nodes: Sequence[str]) -> tuple[ReportEntry, ...]:
        """As :func:`match_kernels`."""
        return match_kernels(entries, self.counts)


@dataclass(frozen=True)
class KernelsByNode:
    """The nodes that run on them, as an engine names them that keeps names."""

    integer: frozenset[str]

    def match(self, entries: Sequence[ReportEntry], nodes: Sequence[str]) -> tuple[ReportEntry, ...]:
        """As :func:`read_kernels`."""
        return read_kernels(entries, nodes, self.integer)


@dataclass(frozen=True)
class NoKernels:
    """There are none, for one reason that holds for every layer."""

    reason: str

    def match(self, entries: Sequence[ReportEntry], nodes: Sequence[str]) -> tuple[ReportEntry, ...]:
        """As :func:`in_float`."""
        return in_float(entries, self.reason)


def _enclosing(name: str) -> list[str]:
    """The paths of the modules around ``name``, the closest one first, ``""`` last."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def match_kernels(entries: Sequence[ReportEntry], counts: Counter[str]) -> tuple[ReportEntry, ...]:
    """Hold what was expected against the integer kernels that the compiled graph really has.

    Args:
        entries: What :func:`classify` expects.
        counts: Integer kernels of the compiled graph by module path (``""`` where it has none). A kernel that took
            in the addition behind its layer has the path of the module that adds, around the layer's own.
    """
    left = Counter(counts)
    matched = list(entries)
    pending = []
    for index, entry in enumerate(matched):
        if not entry.eligible or entry.kernel == "float":
            continue
        if left[entry.name] > 0:
            left[entry.name] -= 1
        else:
            pending.append(index)
    for index, entry in enumerate(matched):
        if entry.reason == NO_MATMUL and left[entry.name] > 0:
            left[entry.name] -= 1
            matched[index] = replace(entry, kernel="integer", reason="", eligible=True)
    for index in pending:
        place = next((path for path in _enclosing(matched[index].name) if left[path] > 0), None)
        if place is None:
            matched[index] = replace(matched[index], kernel="float", reason=MISSED)
        else:
            left[place] -= 1
    return tuple(matched)


def read_kernels(
    entries: Sequence[ReportEntry], nodes: Sequence[str], integer: Container[str]
) -> tuple[ReportEntry, ...]:
    """The entries as an engine runs them, which names the layers that it has on integer kernels.

    What was put in float on purpose keeps its reason.

    Args:
        entries: What :func:`classify` expects.
        nodes: The names of their nodes (:func:`layers`).
        integer: Names of the nodes on integer kernels.
    """
    read = []
    for entry, node in zip(entries, nodes, strict=True):
        expected = entry.eligible and entry.kernel == "integer"
        if node in integer and (expected or entry.reason == NO_MATMUL):
            read.append(replace(entry, kernel="integer", reason="", eligible=True))
        else:
            read.append(replace(entry, kernel="float", reason=MISSED) if expected else entry)
    return tuple(read)


def in_float(entries: Sequence[ReportEntry], reason: str) -> tuple[ReportEntry, ...]:
    """The entries where nothing runs on integer kernels, for ``reason``."""
    return tuple(replace(e, kernel="float", reason=reason) if e.eligible else e for e in entries)
