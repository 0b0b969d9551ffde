"""What a caller asks generators to favour."""

from __future__ import annotations

from collections.abc import Sequence

from tfmq_fx.errors import ConfigError

__all__ = ["check_favoured"]


def check_favoured(favour: Sequence[str], kinds: Sequence[str]) -> None:
    """Refuse kinds that a generator does not have.

    Raises:
        ConfigError: ``favour`` is no sequence of them; the sentence names those that there are.
    """
    if isinstance(favour, str):
        msg = f"favour={favour!r} must be a tuple of kinds, such as ({kinds[0]!r},)"
        raise ConfigError(msg)
    for kind in favour:
        if kind not in kinds:
            msg = f"favour has {kind!r}, which is no kind; use {', '.join(map(repr, sorted(kinds)))}"
            raise ConfigError(msg)
