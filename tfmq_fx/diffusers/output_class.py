"""The class that a model of diffusers returns its result in."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator

__all__ = ["output_class"]


def output_class(model_class: type) -> type | None:
    """What ``forward`` of a model returns with ``return_dict=True``; None where that cannot be read off.

    Its annotation says so; a model without one has the output class that its module defines or imports, where it is
    one alone.

    Args:
        model_class: A model class of diffusers.
    """
    from diffusers.utils import BaseOutput

    forward = inspect.unwrap(model_class.forward)  # type: ignore[attr-defined]  # a model
    try:
        annotation = typing.get_type_hints(forward).get("return")
    except (NameError, TypeError):  # an annotation that cannot be evaluated
        annotation = None
    named = [kind for kind in _members(annotation) if issubclass(kind, BaseOutput)]
    if not named:
        values = vars(sys.modules[model_class.__module__]).values()
        kinds = {kind for kind in values if isinstance(kind, type) and issubclass(kind, BaseOutput)}
        named = sorted(kinds - {BaseOutput}, key=lambda kind: kind.__name__)
    return named[0] if len(named) == 1 else None


def _members(annotation: object) -> Iterator[type]:
    """The classes of an annotation, those of a union one by one."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation
    for member in typing.get_args(annotation):
        yield from _members(member)
