"""Output classes of diffusers: torch can rebuild one only when its module was imported."""

from __future__ import annotations

import contextlib
import importlib
import re

__all__ = ["import_output_classes"]

#: The module of an output class of diffusers, as a structure specification names it.
OUTPUT_CLASS = re.compile(r"\b(diffusers(?:\.[a-z_]\w*)+)\.[A-Z]\w*")


def import_output_classes(structure: str) -> None:
    """Import the diffusers modules of the output classes in ``structure``, a serialized tree: that registers them."""
    for name in OUTPUT_CLASS.findall(structure):
        # A class that is gone from this version is reported by torch's deserializer, by its name.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
