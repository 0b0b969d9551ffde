"""The frontier of a search as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tfmq_fx.diagnostics.plot_parts import PALETTE, SMALL, WIDTH, value_grid
from tfmq_fx.search.result import Measured, SearchResult
from tfmq_fx.search.tradeoff import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["frontier_plot"]

#: A choice or a program that can be a point.
Point = Choice | Measured


def frontier_plot(result: SearchResult) -> Figure:
    """Draw the best choices by what they cost, with one width everywhere, what was chosen, and what was measured of it.

    Args:
        result: Of :func:`tfmq_fx.search_bits`.

    Returns:
        The figure: the size over that of the float model, or the time of a step over that of the first candidate
        everywhere, against the PSNR of the predictions for the items that were kept back. What is exact has no place.
    """
    from matplotlib.figure import Figure

    by_time = result.budget.measure == "latency"
    first = str(result.tradeoff.layers[0].options[0])

    def cost(point: Point) -> float:
        if by_time:
            return (point.seconds or 0.0) / result.tradeoff.base_seconds
        return point.size / result.tradeoff.float_size

    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, result.frontier, cost, "o-", PALETTE[0], "best choices, predicted")
    for index, (name, choice) in enumerate(result.uniform.items()):
        _draw(axes, [choice], cost, "s", PALETTE[3 + index % 3], f"{name} everywhere, predicted")
    _draw(axes, [result.base], cost, "D", PALETTE[6], f"{first} everywhere, measured")
    _draw(axes, [result.choice], cost, "P", PALETTE[1], f"chosen for {result.budget}, predicted", size=11)
    _draw(axes, [result.measured], cost, "*", PALETTE[2], "the same, measured", size=14)
    axes.set_xlabel(f"time of a step over that of {first} everywhere" if by_time else "size over that of float32")
    axes.set_ylabel("PSNR of the predictions in dB (higher is better)")
    axes.set_title("What do bits buy? Widths chosen layer by layer, on items kept back", loc="left", fontsize=11)
    value_grid(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL)
    return figure


def _draw(
    axes: Axes, points: Sequence[Point], cost: Callable[[Point], float], style: str, colour: str, label: str,
    size: float = 5.0,
) -> None:  # fmt: skip
    finite = [point for point in points if math.isfinite(point.fidelity.psnr)]
    if finite:
        x, y = [cost(point) for point in finite], [point.fidelity.psnr for point in finite]
        axes.plot(x, y, style, color=colour, markersize=size, linewidth=1.3, label=label)
