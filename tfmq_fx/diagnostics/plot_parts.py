"""What the pictures are made of: panels, heat maps, curves, colours, and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tfmq_fx.diagnostics.diagnosis import Diagnosis
    from tfmq_fx.diagnostics.layer_error import LayerErrors
    from tfmq_fx.diagnostics.trajectory import TrajectoryDeviation

__all__ = [
    "NEGATIVE",
    "PALETTE",
    "RIGHT_COLOUR",
    "SMALL",
    "WIDTH",
    "block_ticks",
    "classes",
    "curve",
    "decibels",
    "heading",
    "heat",
    "line_width",
    "percent",
    "share",
    "some_percent",
    "spacing",
    "stacked_panels",
    "value_grid",
    "with_section",
]

#: Inches; at 160 dots per inch a little more than the width that is read.
WIDTH = 10.0
#: Height of a layer's row in a heat map, of what stands around the rows of a panel, and of title and axis.
ROW_HEIGHT, PANEL_MARGIN, AXIS_HEIGHT = 0.155, 0.33, 0.75
#: A colour bar and its label need this much, however few rows there are.
LEAST_HEIGHT = 3.2
#: Okabe and Ito (2008), in an order that keeps neighbours apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Quantiles of the samples between which the band of a curve lies.
BAND = (0.1, 0.9)
#: Where the classes of a shift begin, in multiples of the spacing of the timesteps.
CLASSES = (1, 2, 4, 8)
FAR = 1e9
RIGHT_COLOUR = (0.93, 0.93, 0.93, 1.0)
#: Places of the negative classes on the purple–orange map, from the largest shift; the positive ones mirror them.
NEGATIVE = (0.0, 0.13, 0.24, 0.35)
SMALL = 8.5


def with_section(diagnoses: Mapping[str, Diagnosis], section: str) -> dict[str, Any]:
    """The section of every diagnosis that has it.

    Raises:
        ConfigError: None has.
    """
    sections = {label: getattr(diagnosis, section) for label, diagnosis in diagnoses.items()}
    present = {label: value for label, value in sections.items() if value is not None}
    if not present:
        reasons = [d.skipped[section] for d in diagnoses.values() if section in d.skipped]
        msg = f"no diagnosis has the section {section!r} to draw" + (f": {reasons[0]}" if reasons else "")
        raise ConfigError(msg)
    return present


def stacked_panels(rows: Sequence[int], title: str) -> tuple[Figure, list[Axes]]:
    """Panels over one time axis, as high as their rows of layers."""
    from matplotlib.figure import Figure

    height = max(LEAST_HEIGHT, sum(rows) * ROW_HEIGHT + len(rows) * PANEL_MARGIN + AXIS_HEIGHT)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=list(rows))
    panels = list(grid[:, 0])
    for axes in panels[:-1]:
        axes.tick_params(axis="x", length=0)
    figure.suptitle(title, x=0.005, ha="left", fontsize=11)
    panels[-1].set_xlabel("timestep t, from image (low) to noise (high)")
    return figure, panels


def heat(axes: Axes, timesteps: Tensor, layers: Sequence[str], values: Tensor, colour_map: Any, norm: Any) -> None:
    """Draw ``values`` ``[T, L]``: timesteps from left to right, layers from top to bottom."""
    order = timesteps.argsort()
    sorted_steps = timesteps[order]
    middles = (sorted_steps[1:] + sorted_steps[:-1]) / 2
    half = spacing(timesteps) / 2
    edges = torch.cat([sorted_steps[:1] - half, middles, sorted_steps[-1:] + half])
    axes.pcolormesh(edges.numpy(), range(len(layers) + 1), values[order].T.numpy(), cmap=colour_map, norm=norm,
                    rasterized=True)  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(layers))], short(layers), fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def heading(axes: Axes, label: str, summary: str) -> None:
    """A panel's label on the left, its numbers on the right."""
    axes.set_title(label, loc="left", fontsize=10, fontweight="bold", pad=3)
    axes.set_title(summary, loc="right", fontsize=9, pad=3)


def short(layers: Sequence[str]) -> list[str]:
    """The names without the last part, where all have the same: the module path of the block."""
    ends = {layer.rpartition(".")[2] for layer in layers}
    if len(ends) == 1 and len(layers) > 1 and all("." in layer for layer in layers):
        return [layer.rpartition(".")[0] for layer in layers]
    return list(layers)


def spacing(timesteps: Tensor) -> float:
    """The smallest distance of two timesteps; 1 where there are not two."""
    steps = timesteps.sort().values.diff()
    return steps.min().item() if len(steps) else 1.0


def classes(spacing: float) -> tuple[list[float], list[str]]:
    """The bounds and names of the classes of a shift, from the most negative to the most positive."""
    starts = [start * spacing for start in CLASSES]
    inner = [start - spacing / 2 for start in starts]
    bounds = [-FAR, *(-x for x in reversed(inner)), *inner, FAR]
    names = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        if following is None:
            names.append(f"{start:g} and beyond")
        elif following - spacing == start:
            names.append(f"{start:g}")
        else:
            names.append(f"{start:g} to {following - spacing:g}")
    negative = [f"−{name.replace(' to ', ' to −')}" for name in reversed(names)]
    return bounds, [*negative, "0: right", *(f"+{name}" for name in names)]


def curve(axes: Axes, deviation: TrajectoryDeviation, label: str, index: int, count: int, style: str) -> None:
    """One trajectory: its median, and for a solid line its band."""
    colour = PALETTE[index % len(PALETTE)]
    steps = range(1, len(deviation.timesteps) + 1)
    low, middle, high = (above_zero(deviation.quantile(q)) for q in (BAND[0], 0.5, BAND[1]))
    if style == "-":
        axes.fill_between(steps, low, high, facecolor=(colour, 0.12), edgecolor=(colour, 0.4), linewidth=0.8)
    name = f"{label}: mean PSNR {deviation.psnr.mean():.1f} dB"
    axes.plot(steps, middle, style, color=colour, linewidth=line_width(index, count), label=name)


def line_width(index: int, count: int) -> float:
    """Wide lines first, thin ones on top: where curves coincide, all of them show."""
    return 1.3 + 1.6 * (count - 1 - index) / max(count - 1, 1)


def above_zero(values: Tensor) -> Any:
    """Values as numpy, with gaps where a log scale has no place for them."""
    return torch.where(values > 0, values, torch.nan).numpy()


def decibels(errors: LayerErrors) -> Any:
    """The ratios as numpy, with gaps for layers without an error."""
    values = torch.tensor([layer.sqnr for layer in errors.layers], dtype=torch.float64)
    return torch.where(values.isfinite(), values, torch.nan).numpy()


def block_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Name the runs of layers that belong to one block, and separate them."""
    parts = [name.split(".") for name in names]
    blocks = [".".join(part[:2]) if len(part) > 2 and part[1].isdigit() else part[0] for part in parts]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    ends = [*starts[1:], len(blocks)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(middles, [blocks[start] for start in starts], rotation=35, ha="right", rotation_mode="anchor",
                    fontsize=SMALL)  # fmt: skip
    axes.tick_params(axis="x", length=0)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="0.85", linewidth=0.8, zorder=0)


def value_grid(axes: Axes) -> None:
    """Quiet lines to read values by."""
    axes.grid(axis="y", which="major", color="0.85", linewidth=0.8)
    axes.grid(axis="y", which="minor", color="0.94", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def share(value: float) -> str:
    """A share that is not rounded up to all of them."""
    text = f"{100 * value:.1f}"
    return "> 99.9 %" if text == "100.0" and value < 1 else f"{text} %"


def percent(value: float, _: Any = None) -> str:
    """A share as percent, for an axis too."""
    return f"{100 * value:g} %"


def some_percent(value: float, _: Any = None) -> str:
    """Labels of minor ticks: only 2 and 5 of each decade."""
    return percent(float(f"{value:.1g}")) if f"{value:.0e}"[0] in "25" else ""
