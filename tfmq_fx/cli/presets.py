"""``tfmq-fx presets``: the published methods that ``quantize --preset`` takes."""

from __future__ import annotations

from rich.table import Table

from tfmq_fx.cli.console import console
from tfmq_fx.config.presets import PRESETS

__all__ = ["presets"]


def presets() -> None:
    """List the published methods that ``quantize --preset`` takes."""
    table = Table("preset", "source", "what it is", "not in it", show_lines=True)
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.source, preset.summary, preset.limitations)
    console().print(table)
