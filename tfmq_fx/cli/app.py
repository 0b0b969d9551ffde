"""The application: its commands, and how errors leave it."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tfmq_fx import __version__
from tfmq_fx.cli.bisect import bisect
from tfmq_fx.cli.compare import compare
from tfmq_fx.cli.console import print_error, quiet_libraries
from tfmq_fx.cli.diagnose import diagnose
from tfmq_fx.cli.inspect import inspect
from tfmq_fx.cli.listings import backends, presets
from tfmq_fx.cli.quantize import quantize
from tfmq_fx.cli.registered_names import RegisteredNamesCommand
from tfmq_fx.cli.sample import sample
from tfmq_fx.cli.search import search
from tfmq_fx.errors import TfmqError

__all__ = ["app", "main"]


class OneSentenceErrors(TyperGroup):
    """Turns an expected error of a command into one sentence on stderr and exit code 1.

    Usage errors exit with 2 and Ctrl-C with 130, as typer does by itself. Anything else is a bug and
    keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with quiet_libraries():
                return super().invoke(ctx)
        except TfmqError as error:
            print_error(str(error))
        except OSError as error:
            if error.errno is None or error.errno == errno.EPIPE:
                raise
            print_error(f"{error.filename or 'a file'}: {error.strerror}")
        raise typer.Exit(1)


app = typer.Typer(
    name="tfmq-fx",
    cls=OneSentenceErrors,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(requested: bool) -> None:
    """Print the version and leave, where it is asked for."""
    if requested:
        typer.echo(f"tfmq-fx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Quantize diffusion models to real int8 denoisers that keep their sense of time."""


for command in (inspect, presets, backends, quantize, search, sample, compare, diagnose, bisect):
    app.command(cls=RegisteredNamesCommand)(command)


def main() -> None:
    """Entry point of ``tfmq-fx``: exits with 0, 1 (a one-sentence error), 2 (usage) or 130 (Ctrl-C)."""
    app()
