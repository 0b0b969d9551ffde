"""Names of the files of an artefact, and the checks on them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tfmq_fx import __version__

__all__ = ["FILES", "FORMAT", "FORMAT_VERSION", "GRAPH", "MANIFEST", "PREVIOUS", "TENSORS", "installed_versions",
           "is_artefact"]  # fmt: skip

FORMAT = "tfmq_fx.quantized_program"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
GRAPH = "graph.json.gz"
FILES = (TENSORS, GRAPH, MANIFEST)
#: What the files of an artefact are called while a new one takes their place: the manifest then names these.
PREVIOUS = {TENSORS: f".{TENSORS}.previous", GRAPH: f".{GRAPH}.previous"}


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Versions of what reads and writes artefacts."""
    # Our own from this checkout: what is installed may be another one.
    return {"tfmq-fx": __version__, **{name: version(name) for name in ("torch", "torchao", "diffusers")}}


def is_artefact(path: Path) -> bool:
    """Whether ``path`` looks like an artefact: a folder with our manifest in it."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return FORMAT.encode() in file.read(2**16)
