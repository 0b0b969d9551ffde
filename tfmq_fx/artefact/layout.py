"""Names of the files of an artefact, and the checks on them."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

__all__ = ["FORMAT", "FORMAT_VERSION", "GRAPH", "MANIFEST", "TENSORS", "checksum", "installed_versions", "is_artefact"]

FORMAT = "tfmq_fx.quantized_program"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"
GRAPH = "graph.json.gz"


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of what reads and writes artefacts."""
    return {name: version(name) for name in ("tfmq-fx", "torch", "torchao", "diffusers")}


def is_artefact(path: Path) -> bool:
    """Whether ``path`` looks like an artefact: a folder with our manifest in it."""
    manifest = path / MANIFEST
    return manifest.is_file() and FORMAT in manifest.read_text(encoding="utf-8", errors="replace")
