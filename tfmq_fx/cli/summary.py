"""What commands that write an artefact say of it at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfmq_fx.cli.console import console, size_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["print_summary"]


def print_summary(module: nn.Module, program: QuantizedProgram, out: Path) -> None:
    """Print the size, the timesteps and the error of an artefact.

    Args:
        module: The float model.
        program: What was saved.
        out: Where.
    """
    from tfmq_fx.diagnostics.comparison import float_bytes, path_bytes

    before, after = float_bytes(module), path_bytes(out)
    timesteps = program.timesteps
    timestep_count = 0 if timesteps is None else len(timesteps)
    console().print(
        f"[bold green]{out}[/]: {size_text(after)}, {after / before:.2f} × the fp32 weights ({size_text(before)}); "
        f"{timestep_count} timesteps, {len(program.kept_float)} layers kept float",
        soft_wrap=True,
    )
    if program.fidelity is not None:
        console().print(f"  compared with float: {program.fidelity}", soft_wrap=True, markup=False, highlight=False)
    for choice in program.temporal_choices:
        console().print(f"  table: {choice}", soft_wrap=True, markup=False, highlight=False)
