"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tfmq_fx.errors import ArtefactError

__all__ = ["path_of"]


def path_of(value: Any, what: str) -> Path:
    """``value`` as a path, with ``~`` as the home folder.

    Args:
        value: What was given.
        what: What the message calls it, such as ``"an artefact"``.

    Raises:
        ArtefactError: It is none, leads in a circle, or begins with the home of nobody.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        msg = f"the path of {what} is a {type(value).__name__}; pass a string or a pathlib.Path"
        raise ArtefactError(msg)
    try:
        path = Path(value).expanduser()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        msg = f"the path of {what} cannot be used ({error}); choose another path"
        raise ArtefactError(msg) from error
    return path
