"""Options whose values are names in a registry: they are looked up when an option is read or its help is shown.

So what a program registers before it runs the command line is an option, and a help without such options imports no
registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["RegisteredNamesCommand", "activation_observers", "backends", "name_parser", "reconstructions", "samplers"]


def activation_observers() -> Iterable[str]:
    """How activation ranges are chosen."""
    from tfmq_fx.observers.registry import activation_observer_names

    return activation_observer_names()


def samplers() -> Iterable[str]:
    """How calibration timesteps are drawn."""
    from tfmq_fx.data.timestep_samplers import SAMPLERS

    return SAMPLERS


def reconstructions() -> Iterable[str]:
    """How weight rounding is learned."""
    from tfmq_fx.config.reconstruction import RECONSTRUCTIONS

    return RECONSTRUCTIONS


def backends() -> Iterable[str]:
    """What a program is lowered to."""
    from tfmq_fx.lowering.backends.registry import backend_names

    return backend_names()


#: The registry of each option of this kind, by the name of its parameter.
REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {
    "activation_range": activation_observers,
    "backend": backends,
    "sampler": samplers,
    "reconstruction": reconstructions,
}


def name_parser(names: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """A parser that takes the names of a registry and refuses others as wrong usage."""

    def parse(value: str) -> str:
        choices = tuple(names())
        if value not in choices:
            msg = f"{value!r} is not one of {', '.join(map(repr, choices))}."
            raise typer.BadParameter(msg)
        return value

    return parse


class RegisteredNamesCommand(TyperCommand):
    """A command whose help lists the names that are registered by then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        for parameter in self.params:
            if parameter.name in REGISTRIES:
                parameter.metavar = f"<{'|'.join(REGISTRIES[parameter.name]())}>"
        super().format_help(ctx, formatter)
