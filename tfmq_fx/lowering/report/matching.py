"""Hold the layers that were expected on integer kernels against the kernels that there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import replace

from tfmq_fx.lowering.report.reasons import MISSED, NO_MATMUL
from tfmq_fx.lowering.report.report import ReportEntry

__all__ = ["in_float", "match_kernels", "read_kernels"]


def _enclosing(name: str) -> list[str]:
    """The paths of the modules around ``name``, the closest one first, ``""`` last."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def match_kernels(entries: list[ReportEntry], found: Counter[str]) -> tuple[ReportEntry, ...]:
    """Hold what was expected against the integer kernels that the compiled graph really has.

    Args:
        entries: What :func:`classify` expects.
        found: Integer kernels of the compiled graph by module path (``""`` where it has none). A kernel that took
            in the addition behind its layer has the path of the module that adds, around the layer's own.
    """
    left = Counter(found)
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


def read_kernels(entries: list[ReportEntry], nodes: list[str], integer: Container[str]) -> tuple[ReportEntry, ...]:
    """The entries as an engine runs them, which names the layers that it has on integer kernels.

    Args:
        entries: What :func:`classify` expects.
        nodes: The names of their nodes (:func:`layers`).
        integer: Names of the nodes on integer kernels.
    """
    read = []
    for entry, node in zip(entries, nodes, strict=True):
        if node in integer and (entry.eligible or entry.reason == NO_MATMUL):
            read.append(replace(entry, kernel="integer", reason="", eligible=True))
        else:
            read.append(replace(entry, kernel="float", reason=MISSED) if entry.eligible else entry)
    return tuple(read)


def in_float(entries: list[ReportEntry], reason: str) -> list[ReportEntry]:
    """The entries where nothing runs on integer kernels, for ``reason``."""
    return [replace(e, kernel="float", reason=reason) if e.eligible else e for e in entries]
