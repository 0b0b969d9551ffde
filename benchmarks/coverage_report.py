"""The coverage matrix as a table."""

from __future__ import annotations

from typing import Any

__all__ = ["TITLES", "cells", "markdown"]

TITLES = (
    "architecture",
    "captured by",
    "temporal block",
    "conditional part",
    "integer kernels",
    "left float",
    "W8A8",
    "W8A8, lowered",
    "W4A8",
    "CPU time, peak memory",
)

#: Shorter ways to say what the lowering report says.
SHORT = (
    ("no integer kernel for a product of two activations", "products of attention"),
    ("no integer kernel for this operator", "operators without a kernel"),
    ("keep_float has 'input'", "first layers, by choice"),
    ("keep_float has 'output'", "last layers, by choice"),
    ("temporal='float'", "time path"),
    ("transposed convolutions", "transposed convolutions"),
    ("reference backend", "reference backend"),
    ("the compiler left it", "missed by the compiler"),
    ("parameters per timestep", "per timestep"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row; what was refused or failed stands where the kernels would."""
    outcome = _one_line(row.get("refused", "") or row.get("failed", ""))
    kernels = f"{row['integer']} of {row['eligible']}" if "integer" in row else ""
    if outcome:
        kernels = f"{'refused' if 'refused' in row else 'FAILED'}: {outcome}"
    size = f"{row['cpu_seconds']:.0f} s, {row['peak_bytes'] / 1e9:.1f} GB" if "seconds" in row else ""
    return [
        row["name"],
        row.get("captured", ""),
        _block(row.get("block")),
        _conditional(row.get("block")),
        kernels,
        _left_float(row.get("float_because", {})),
        _percent(row, "W8A8"),
        _percent(row, "lowered"),
        _percent(row, "W4A8"),
        size,
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The whole matrix as a Markdown table."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    for row in rows:
        if row["backend"] == "none" and "stages" in row:
            lines += ["", *_stages(row)]
    return "\n".join(lines)


def _stages(row: dict[str, Any]) -> list[str]:
    lines = [
        f"| {row['name']}, {row['parameters'] / 1e6:.0f} M parameters | CPU seconds | seconds | peak so far, GB |",
        "|---|---|---|---|",
    ]
    for name, cost in row["stages"].items():
        lines.append(f"| {name} | {cost['cpu_seconds']:.1f} | {cost['seconds']:.1f} | {cost['peak_bytes'] / 1e9:.1f} |")
    return lines


def _block(block: dict[str, Any] | None) -> str:
    if not block:
        return ""
    if block["reason"]:
        return f"none: {_one_line(block['reason'])}"
    found = f"h {block['h']}, g {block['g']}, frontier {block['frontier']}"
    return found if block["g_with_classes"] is None else f"{found}; with classes g {block['g_with_classes']}"


def _conditional(block: dict[str, Any] | None) -> str:
    if not block or (block["reason"] and not block["conditional_layers"]):
        return ""
    if not block["conditional_layers"]:
        return "timestep only"
    conditions = block["conditions"]
    kind = "classes" if all(name in ("class_labels", "y") for name in conditions) else "prompt"
    return f"{kind}: {block['conditional_layers']} layers of t and {', '.join(conditions)}"


def _left_float(reasons: dict[str, int]) -> str:
    def short(reason: str) -> str:
        return next((words for part, words in SHORT if part in reason), _one_line(reason))

    return "; ".join(f"{count} {short(reason)}" for reason, count in reasons.items())


def _percent(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.1%}" if key in row else ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
