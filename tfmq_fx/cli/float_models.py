"""A float model that a command was given: a quantized artefact in its place is named before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from tfmq_fx.errors import ConfigError

__all__ = ["require_no_artefact"]


def require_no_artefact(model: str | None, remedy: str = "name the float model that it was made from") -> None:
    """Refuse an artefact where a model is meant.

    Args:
        model: The command's MODEL.
        remedy: What to do instead.

    Raises:
        ConfigError: It is an artefact.
    """
    from tfmq_fx.artefact.layout import is_artefact

    if model is not None and is_artefact(Path(model)):
        msg = f"{model} is a quantized artefact, and MODEL is a float model; {remedy}"
        raise ConfigError(msg)
