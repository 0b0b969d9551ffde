"""Advisory locks, which end with the process that holds them: they tell a running save from a killed one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none; saves then go on without, and leave what others left
    fcntl = None  # type: ignore[assignment]  # a system without it

__all__ = ["held", "hold"]


def hold(path: Path, *, wait: bool) -> int | None:
    """Lock a file or folder until the returned descriptor is closed; None when another process holds it.

    A file system without locks gives None too, unless it may wait: then the descriptor locks nothing.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(descriptor)
            return None
    return descriptor


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder inside the block, after whoever has it."""
    descriptor = hold(path, wait=True)
    try:
        yield
    finally:
        assert descriptor is not None
        os.close(descriptor)
