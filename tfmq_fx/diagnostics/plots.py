"""Pictures of diagnoses: every function returns a matplotlib ``Figure``; nothing global is touched.

Colours are safe for colour-blind readers (Okabe and Ito's palette, cividis, purple–orange), and all pictures
are laid out to be read at a width of 1200 pixels. Save one with ``figure.savefig(path, dpi=160)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from tfmq_fx.diagnostics.plot_parts import (
    NEGATIVE,
    PALETTE,
    RIGHT_COLOUR,
    SMALL,
    WIDTH,
    block_ticks,
    classes,
    curve,
    decibels,
    heading,
    heat,
    line_width,
    percent,
    share,
    some_percent,
    spacing,
    stacked_panels,
    value_grid,
    with_section,
)
from tfmq_fx.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tfmq_fx.diagnostics.diagnosis import Diagnosis
    from tfmq_fx.diagnostics.features import TemporalFeatureError
    from tfmq_fx.diagnostics.layer_error import LayerErrors
    from tfmq_fx.diagnostics.mismatch import TemporalMismatch
    from tfmq_fx.diagnostics.trajectory import TrajectoryDeviation

__all__ = ["deviation_curve", "feature_error_plot", "layer_error_plot", "mismatch_heatmap"]


def mismatch_heatmap(diagnoses: Mapping[str, Diagnosis], *, measure: str = "cosine") -> Figure:
    """Draw the temporal information mismatch per timestep and layer, a panel per program over one time axis.

    Args:
        diagnoses: The diagnoses by label. Those without a mismatch are left out.
        measure: ``"cosine"`` (the paper's) or ``"distance"``.

    Returns:
        The figure. Colours are classes of ``t* - t``, so that a shift by one timestep shows beside a large one.

    Raises:
        ConfigError: No diagnosis has a mismatch, or the measure is unknown.

    Source: TFMQ-DM (CVPR 2024), section 4, "temporal information mismatch".
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    if measure not in ("cosine", "distance"):
        msg = f"measure={measure!r} is not supported: use 'cosine' or 'distance'"
        raise ConfigError(msg)
    section = "mismatch" if measure == "cosine" else "nearest"
    by_label: dict[str, TemporalMismatch] = with_section(diagnoses, section)
    bounds, names = classes(min(spacing(mismatch.timesteps) for mismatch in by_label.values()))
    colours = [colormaps["PuOr"](x) for x in NEGATIVE]
    colours += [RIGHT_COLOUR, *(colormaps["PuOr"](1 - x) for x in reversed(NEGATIVE))]
    colour_map, norm = ListedColormap(colours), BoundaryNorm(bounds, len(names))
    of = "most similar" if measure == "cosine" else "nearest"
    title = f"Which timestep t* does the quantized temporal feature of timestep t speak of? ({of} float feature)"
    figure, panels = stacked_panels([len(mismatch.layers) for mismatch in by_label.values()], title)
    for axes, (label, mismatch) in zip(panels, by_label.items(), strict=True):
        heat(axes, mismatch.timesteps, mismatch.layers, mismatch.delta, colour_map, norm)
        heading(axes, label, f"{share(mismatch.share_right)} right, mean |δ| {mismatch.mean_shift:.2f} timesteps")
    scale = figure.colorbar(ScalarMappable(norm, colour_map), ax=panels, fraction=0.03, pad=0.015, aspect=30)
    middles = [(low + high) / 2 for low, high in pairwise(bounds)]
    scale.set_ticks(middles, labels=names, fontsize=SMALL)
    scale.minorticks_off()
    scale.ax.tick_params(length=0)
    scale.set_label("shift δ = t* − t, in timesteps")
    return figure


def feature_error_plot(diagnoses: Mapping[str, Diagnosis]) -> Figure:
    """Draw the relative feature error per timestep and layer, a panel per program, on one log scale.

    Args:
        diagnoses: The diagnoses by label. Those without temporal features are left out.

    Raises:
        ConfigError: No diagnosis has temporal features.

    Source: TFMQ-DM (CVPR 2024), section 4, "temporal feature error"; the relative norm is ours.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    by_label: dict[str, TemporalFeatureError] = with_section(diagnoses, "features")
    values = torch.cat([error.relative.flatten() for error in by_label.values()])
    positive = values[(values > 0) & values.isfinite()]
    low, high = (positive.min().item(), positive.max().item()) if len(positive) else (1e-3, 1.0)
    # An exact feature has no logarithm; it takes the colour below the scale.
    colour_map = colormaps["cividis"].with_extremes(under="white", bad="white")
    norm = LogNorm(low, max(high, low * 1.01))
    title = "How far are the quantized temporal features from the float ones?"
    figure, panels = stacked_panels([len(error.layers) for error in by_label.values()], title)
    for axes, (label, error) in zip(panels, by_label.items(), strict=True):
        heat(axes, error.timesteps, error.layers, error.relative, colour_map, norm)
        heading(axes, label, f"{100 * error.overall:.2f} % over all timesteps and layers")
    exact = bool((values == 0).any())
    scale = figure.colorbar(ScalarMappable(norm, colour_map), ax=panels, fraction=0.03, pad=0.015, aspect=30)
    scale.ax.yaxis.set_major_formatter(FuncFormatter(percent))
    scale.ax.yaxis.set_minor_formatter(FuncFormatter(some_percent))
    scale.ax.tick_params(which="both", labelsize=SMALL)
    scale.set_label("relative error ‖êmb − emb‖ / ‖emb‖" + (" (white: none)" if exact else ""))
    return figure


def deviation_curve(diagnoses: Mapping[str, Diagnosis], *, temporal: bool = True) -> Figure:
    """Draw how far the samples are from the float model's after each step, with a band over the samples.

    Args:
        diagnoses: The diagnoses by label. Those without a trajectory are left out.
        temporal: Whether the curves with the temporal block alone quantized are drawn, too, dashed.

    Returns:
        The figure: medians over the samples on a log scale, with a band from the first to the last decile.
        A step without any deviation has no place on that scale.

    Raises:
        ConfigError: No diagnosis has a trajectory.

    Source: the set-up is that of TFMQ-DM (CVPR 2024), section 4; the norm is ours.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    by_label: dict[str, TrajectoryDeviation] = with_section(diagnoses, "trajectory")
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for index, (label, whole) in enumerate(by_label.items()):
        curve(axes, whole, label, index, len(by_label), "-")
    for index, label in enumerate(by_label if temporal else ()):
        part = diagnoses[label].temporal_trajectory
        if part is not None:
            curve(axes, part, f"{label}, temporal block alone", index, len(by_label), "--")
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.yaxis.set_minor_formatter(FuncFormatter(some_percent))
    axes.tick_params(axis="y", which="minor", labelsize=SMALL)
    axes.set_xlim(1, max(len(deviation.timesteps) for deviation in by_label.values()))
    axes.set_xlabel("sampling step, from noise to image")
    axes.set_ylabel("deviation from the float trajectory, ‖x̂ − x‖ / ‖x‖")
    samples = "/".join(sorted({str(deviation.relative.shape[1]) for deviation in by_label.values()}))
    title = f"How far from the float samples? Median of {samples}, bands from the first to the last decile"
    axes.set_title(title, loc="left", fontsize=11)
    value_grid(axes)
    figure.legend(loc="outside lower center", ncols=2 if temporal else 1, frameon=False, fontsize=9)
    return figure


def layer_error_plot(diagnoses: Mapping[str, Diagnosis]) -> Figure:
    """Draw the SQNR of every weighted layer, in the order in which the net runs them.

    Args:
        diagnoses: The diagnoses by label. Those without layers are left out; all are of one model.

    Returns:
        The figure: a line as the net runs, and dots for each layer alone, on float inputs. A layer without
        any error, alone in float, has no place on the scale.

    Raises:
        ConfigError: No diagnosis has layers, or they are of different models.
    """
    from matplotlib.figure import Figure

    by_label: dict[str, LayerErrors] = with_section(diagnoses, "layers")
    names = [layer.name for layer in next(iter(by_label.values())).layers]
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, errors) in enumerate(by_label.items()):
        if [layer.name for layer in errors.layers] != names:
            msg = f"{label} has other layers than {next(iter(by_label))}; draw programs of one model together"
            raise ConfigError(msg)
        colour = PALETTE[index % len(PALETTE)]
        width = line_width(index, len(by_label))
        axes.plot(range(len(names)), decibels(errors), "-", color=colour, linewidth=width, label=label)
        local = diagnoses[label].local_layers
        if local is not None and [layer.name for layer in local.layers] == names:
            alone = f"{label}, each layer alone"
            size = 1.0 + 1.5 * width
            axes.plot(range(len(names)), decibels(local), "o", color=colour, markersize=size, label=alone)
    block_ticks(axes, names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_title("Where is the signal lost? As the net runs, and each layer alone", loc="left", fontsize=11)
    axes.set_xlabel("convolutions and linears in the order in which they run, by block")
    axes.set_ylabel("SQNR in dB (higher is better)")
    value_grid(axes)
    figure.legend(loc="outside lower center", ncols=len(by_label), frameon=False, fontsize=9)
    return figure
