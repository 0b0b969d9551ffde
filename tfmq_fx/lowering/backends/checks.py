"""What a backend, one of another package too, is held to when it is registered and when it has compiled."""

from __future__ import annotations

from typing import Any

from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.backend import Backend

__all__ = ["check_attributes"]


def check_attributes(backend: Backend, source: str) -> None:
    """Refuse a backend that could not be listed or asked for.

    Args:
        backend: The backend.
        source: Where it is from, for errors.

    Raises:
        LoweringError: Its name, title or summary is no text, or what it requires are no names of packages.
    """
    for attribute in ("name", "title", "summary"):
        value: Any = getattr(backend, attribute, None)
        if not isinstance(value, str) or not value:
            kind = type(backend).__name__
            msg = f"{source}: {kind}.{attribute} must be a string that is not empty, not {value!r}"
            raise LoweringError(msg)
    requires: Any = backend.requires
    names = requires if isinstance(requires, (tuple, list)) else ()
    if not isinstance(requires, (tuple, list)) or not all(isinstance(name, str) and name for name in names):
        msg = f"{source}: {type(backend).__name__}.requires must be a tuple of package names, not {requires!r}"
        raise LoweringError(msg)
