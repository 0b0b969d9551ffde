"""What every command prints with: consoles, error sentences, sizes, and quiet libraries."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.text import Text

__all__ = ["console", "print_error", "quiet_libraries", "size_text", "stage"]


def console() -> Console:
    """The console for results, on stdout."""
    return Console(highlight=False)


def print_error(sentence: str) -> None:
    """Print one red sentence to stderr; it is not wrapped, so that scripts can search it."""
    _errors().print(Text(f"error: {sentence}", style="bold red"), soft_wrap=True)


def stage(text: str) -> None:
    """Say on stderr which stage begins; stdout holds results only."""
    _errors().print(Text(f"› {text}", style="dim"), soft_wrap=True)


def size_text(size: int) -> str:
    """A file size for people: ``1.4 MB`` (decimal, as file managers count)."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the chatter of imported libraries; warnings of this package become one yellow sentence."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _is_ours():
            _errors().print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield
    finally:
        logging.disable(disabled)


def _is_ours() -> bool:
    """Whether the code that warns right now is of this package.

    A filter by module cannot tell: it sees the caller that the warning is credited to, such as torchao or typer.
    """
    warners = (frame.frame.f_globals.get("__name__", "") for frame in inspect.stack(context=0)[2:])  # behind show
    name = next((name for name in warners if name not in ("warnings", "_py_warnings")), "")
    return name.split(".")[0] == __name__.split(".")[0]


def _errors() -> Console:
    return Console(stderr=True, highlight=False)
