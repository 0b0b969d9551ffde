"""What to quantize and how: configurations, their checks, presets of published methods."""

from importlib import import_module
from typing import TYPE_CHECKING

#: The modules that the reference lists. They are imported on first use, because the command line needs the choices of a
#: configuration for its help, and configurations import torch.
_MODULES = ("presets", "quantization", "reconstruction")

if not TYPE_CHECKING:  # a type checker that saw this function would take any name for an attribute

    def __getattr__(name: str) -> object:
        """Import a public module when it is first used."""
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)


def __dir__() -> list[str]:
    """What is there and what will be imported when it is asked for."""
    return sorted({*globals(), *_MODULES})
