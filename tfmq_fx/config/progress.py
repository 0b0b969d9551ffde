"""Progress bars: whether one is drawn. All of them are on stderr, and one switch turns them off."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["SWITCH", "draws_progress", "progress_console"]

#: The environment variable; ``TFMQ_FX_PROGRESS=0`` turns every progress bar off.
SWITCH = "TFMQ_FX_PROGRESS"


def progress_console() -> Console:
    """The console that progress bars are drawn on."""
    return Console(stderr=True)


def draws_progress(requested: bool = True) -> bool:
    """Whether to draw a progress bar: where it is wanted, not switched off, and stderr is a terminal or a notebook.

    Args:
        requested: What the caller's ``progress=`` says.
    """
    console = progress_console()
    return requested and os.environ.get(SWITCH, "1") != "0" and (console.is_terminal or console.is_jupyter)
