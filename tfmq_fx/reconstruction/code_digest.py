"""A digest of this package's own code: two runs of different code are different runs, whatever the version says."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import tfmq_fx.passes

__all__ = ["code_digest"]


@functools.cache
def code_digest() -> str:
    """SHA-256 of every Python file and kernel header of the package, in the order of their names."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], Path(tfmq_fx.passes.__file__).parent):
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.h"))):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
