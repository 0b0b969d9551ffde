"""Artefacts to change, with checksums that fit what was changed."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfmq_fx.artefact.layout import GRAPH, MANIFEST, TENSORS

__all__ = ["change_graph", "change_manifest", "read_graph", "read_manifest", "resign", "write_graph"]


def read_manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())


def change_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    """Edit the manifest in place."""
    values = read_manifest(folder)
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def resign(folder: Path) -> None:
    """Have the manifest say what is in the files."""

    def sign(manifest: Any) -> None:
        for name in (TENSORS, GRAPH):
            data = (folder / name).read_bytes()
            manifest["files"][name].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    change_manifest(folder, sign)


def read_graph(folder: Path) -> Any:
    return json.loads(gzip.decompress((folder / GRAPH).read_bytes()))


def write_graph(folder: Path, values: Any) -> None:
    """Replace the graph, JSON or its text, and sign it."""
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    (folder / GRAPH).write_bytes(gzip.compress(data, compresslevel=1, mtime=0))
    change_manifest(folder, lambda m: m["files"][GRAPH].update(expanded=len(data)))
    resign(folder)


def change_graph(folder: Path, change: Callable[[Any], Any]) -> None:
    """Edit the graph's JSON in place, and sign it."""
    values = read_graph(folder)
    change(values)
    write_graph(folder, values)
