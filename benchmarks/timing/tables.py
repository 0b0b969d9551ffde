"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latency_engines import GROUPS

__all__ = ["markdown"]

HEADER = (
    "| engine | ms | × compiled fp32 | × floor | relative error | others | memory, MB | file, MB "
    "| prepare, s | first start, s | later start, s |"
)
SAMPLING_HEADER = "| engine | 50 steps, s | × compiled fp32 | error of the result |"
#: What the issue of a fast denoiser is about: ours against what else there is, by group or engine.
QUESTIONS = (
    ("best of ours W8A8", "best peer int8"),
    ("best of ours W8A8", "compile fp32"),
    ("best of ours W8A8", "best bf16"),
    ("ours W8A8 inductor", "best NNCF + OpenVINO int8"),
    ("ours W8A8 inductor", "torchao int8"),
)

Rows = Mapping[str, Mapping[str, Any]]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _spread(value: Mapping[str, float], scale: float = 1.0) -> str:
    return f"{_number(value['median'] * scale)} ({_number(value['low'] * scale)}–{_number(value['high'] * scale)})"


def _faster(row: Mapping[str, Any], key: str, reference: str) -> str:
    ratio = row[key].get(reference)
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _row(name: str, row: Mapping[str, Any], reference: str, floors: Mapping[str, float] | None) -> str:
    if "refused" in row:
        return f"| {name} | {row['refused']}" + " |" * (HEADER.count(" |") - 1)
    time, starts = row["seconds"], row["starts"]
    cells = [
        name,
        _spread(time, 1e3),
        _faster(row, "times_faster", reference),
        f"{time['median'] / floors[row['arithmetic']]:.1f}" if floors else "",
        f"{row['relative_error']:.4f}",
        f"{row['others']:.0%}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['file_bytes'] / 1e6:.1f}",
        _number(row["prepare_seconds"]),
        *(_number(starts[kind]["start_seconds"]) if kind in starts else "" for kind in ("first", "later")),
    ]
    return "| " + " | ".join(cells) + " |"


def _rule(header: str) -> str:
    return "|" + "---|" * header.count(" |")


def _timed(rows: Rows) -> list[str]:
    return sorted((n for n in rows if "seconds" in rows[n]), key=lambda n: float(rows[n]["seconds"]["median"]))


def _fastest(rows: Rows, name: str) -> str | None:
    """An engine, or the fastest one of a group; None where none was timed."""
    members: Sequence[str] = GROUPS.get(name, (name,))
    return next((engine for engine in _timed(rows) if engine in members), None)


def _answers(rows: Rows) -> list[str]:
    lines = []
    for ours, theirs in QUESTIONS:
        a, b = _fastest(rows, ours), _fastest(rows, theirs)
        if a is None or b is None:
            continue
        names = [kind if kind == engine else f"{kind} ({engine})" for kind, engine in ((ours, a), (theirs, b))]
        lines.append(f"- {names[0]} is {_faster(rows[a], 'times_faster', b)} times as fast as {names[1]}.")
    return lines


def _machine(cell: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    has = ", ".join(cell["has"])
    return f"{cell['processor']} ({has}), {cell['cores']} cores, {cell['threads']} threads; {versions}."


def _cell(cell: Mapping[str, Any], reference: str, floors: Mapping[str, float] | None) -> list[str]:
    rows = cell["engines"]
    refused = [name for name in rows if "refused" in rows[name]]
    lines = [f"### {cell['unet']}, batch {cell['batch']} ({cell['date']})", "", _machine(cell), ""]
    if floors:
        values = ", ".join(f"{arithmetic} {seconds * 1e3:.1f} ms" for arithmetic, seconds in floors.items())
        lines += [f"Floor: {values}.", ""]
    lines += [HEADER, _rule(HEADER)]
    lines += [_row(name, rows[name], reference, floors) for name in (*_timed(rows), *refused)]
    lines += ["", *_answers(rows), ""]
    sampled = sorted(
        (name for name in rows if "sampling_seconds" in rows[name]),
        key=lambda name: float(rows[name]["sampling_seconds"]["median"]),
    )
    if sampled:
        lines += [SAMPLING_HEADER, _rule(SAMPLING_HEADER)]
        for name in sampled:
            row = rows[name]
            faster = _faster(row, "sampling_times_faster", reference)
            lines.append(f"| {name} | {_spread(row['sampling_seconds'])} | {faster} | {row['sampling_error']:.3f} |")
        lines.append("")
    return lines


def markdown(cells: Mapping[str, Any], reference: str, roofline: Mapping[str, Any]) -> str:
    """One table a cell, fastest first, with the floors beside the times.

    Args:
        cells: As ``latency.py`` records them.
        reference: The engine that ratios are of.
        roofline: As ``roofline.py`` records it; empty where it has not run.
    """
    floors = roofline.get("floors", {})
    lines = []
    for name, cell in cells.items():
        lines += _cell(cell, reference, floors[name]["seconds"] if name in floors else None)
    return "\n".join(lines)
