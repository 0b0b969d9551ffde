"""A diagnosis as rich tables."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tfmq_fx.diagnostics.diagnosis import Diagnosis
    from tfmq_fx.diagnostics.layer_error import LayerError
    from tfmq_fx.diagnostics.mismatch import TemporalMismatch
    from tfmq_fx.diagnostics.trajectory import TrajectoryDeviation

__all__ = ["as_text", "comparison_table", "diagnosis_tables"]

#: Layers that the second table lists.
WORST = 8
TEXT_WIDTH = 110

ROWS = (
    ("temporal features, relative error", "features"),
    ("  cosine, mean and smallest", "features"),
    ("right timestep, by cosine", "mismatch"),
    ("right timestep, by distance", "nearest"),
    ("deviation of the final sample", "trajectory"),
    ("  temporal block alone", "temporal_trajectory"),
    ("PSNR of the final sample", "trajectory"),
    ("  temporal block alone", "temporal_trajectory"),
    ("SQNR, layers as the net runs", "layers"),
    ("SQNR, layers each alone", "local_layers"),
)


def comparison_table(diagnoses: Sequence[Diagnosis]) -> Table:
    """The summaries of several diagnoses in columns."""
    table = Table("", *(diagnosis.label for diagnosis in diagnoses), title="quantized against float")
    table.title_justify = "left"
    columns = [_summary(diagnosis) for diagnosis in diagnoses]
    for index, (name, section) in enumerate(ROWS):
        if any(getattr(diagnosis, section) is not None for diagnosis in diagnoses):
            table.add_row(name, *(column[index] for column in columns))
    return table


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """The summary of one diagnosis, its layers with the lowest SQNR, and what was left out."""
    tables = [comparison_table([diagnosis])]
    if diagnosis.layers is not None:
        tables.append(_worst_layers(diagnosis))
    if diagnosis.skipped:
        table = Table("left out", "because", title_justify="left")
        for section, reason in diagnosis.skipped.items():
            table.add_row(section, reason)
        tables.append(table)
    return tables


def as_text(tables: Sequence[Table]) -> str:
    """Tables as plain text."""
    file = io.StringIO()
    console = Console(file=file, width=TEXT_WIDTH, highlight=False)
    for table in tables:
        console.print(table)
    return file.getvalue().rstrip("\n")


def _worst_layers(diagnosis: Diagnosis) -> Table:
    assert diagnosis.layers is not None
    table = Table("layer", "SQNR as the net runs", "alone", title=f"{diagnosis.label}: the layers that lost most")
    table.title_justify = "left"
    alone = {} if diagnosis.local_layers is None else {x.name: x for x in diagnosis.local_layers.layers}
    for layer in diagnosis.layers.worst(WORST):
        local = _sqnr_text(alone[layer.name]) if layer.name in alone else ""
        table.add_row(layer.name, _sqnr_text(layer), local)
    return table


def _sqnr_text(layer: LayerError) -> str:
    return "exact" if layer.error == 0 else f"{layer.sqnr:.1f} dB"


def _summary(diagnosis: Diagnosis) -> list[str]:
    """The cells of one column, in the order of :data:`ROWS`."""
    features = diagnosis.features
    cells = ["–", "–"]
    if features is not None:
        cells = [f"{features.overall:.2%}", f"{features.mean_cosine:.5f}, {features.least_cosine:.5f}"]
    cells += [_mismatch_text(diagnosis.mismatch), _mismatch_text(diagnosis.nearest)]
    for text in (_deviation_text, _psnr_text):
        cells += [text(diagnosis.trajectory), text(diagnosis.temporal_trajectory)]
    for layers in (diagnosis.layers, diagnosis.local_layers):
        if layers is None:
            cells.append("–")
            continue
        ratios = torch.tensor([layer.sqnr for layer in layers.layers])
        cells.append(f"median {ratios.median():.1f} dB, worst {ratios.min():.1f} dB")
    return cells


def _mismatch_text(mismatch: TemporalMismatch | None) -> str:
    if mismatch is None:
        return "–"
    return f"{mismatch.share_right:.1%} of {mismatch.delta.numel()}, mean |δ| {mismatch.mean_shift:.2f}"


def _deviation_text(deviation: TrajectoryDeviation | None) -> str:
    return "–" if deviation is None else f"{deviation.mean[-1]:.2%}"


def _psnr_text(deviation: TrajectoryDeviation | None) -> str:
    return "–" if deviation is None else f"mean {deviation.psnr.mean():.1f} dB, worst {deviation.psnr.min():.1f} dB"
