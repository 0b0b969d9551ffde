"""``tfmq-fx presets`` and ``tfmq-fx backends``: what ``--preset`` and ``--backend`` take."""

from __future__ import annotations

from rich.table import Table

from tfmq_fx.cli.console import console
from tfmq_fx.config.presets import PRESETS
from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.registry import backend_names, find_backend

__all__ = ["backends", "presets"]


def presets() -> None:
    """List the published methods that ``quantize --preset`` takes."""
    table = Table("preset", "source", "what it is", "not in it", show_lines=True)
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.source, preset.summary, preset.limitations)
    console().print(table)


def backends() -> None:
    """List what a quantized model can be lowered to."""
    table = Table("backend", "what it is", "precisions", "installed")
    for name in backend_names():
        try:
            backend = find_backend(name)
        except LoweringError as error:  # another package's
            table.add_row(name, str(error), "", "no")
            continue
        missing = ", ".join(backend.missing_packages())
        table.add_row(name, backend.summary, ", ".join(backend.precisions), f"no: {missing}" if missing else "yes")
    console().print(table)
