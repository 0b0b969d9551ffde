"""Every pass by its id, read off the classes themselves: nothing is listed twice."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.base import GraphPass

__all__ = ["check_pass_ids", "find_pass", "ids_of", "pass_registry"]


def pass_registry() -> Mapping[str, type[GraphPass]]:
    """Every pass by id: those in the rooms of ``tfmq_fx.passes``, and any other that was imported.

    Raises:
        ConfigError: Two classes have one id.
    """
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "tfmq_fx.passes."):
        importlib.import_module(module.name)
    by_id: dict[str, type[GraphPass]] = {}
    for kind in _subclasses(GraphPass):
        # A class that inherits its id is a variant of a pass, such as one of a test, and no pass of its own.
        if inspect.isabstract(kind) or "id" not in vars(kind):
            continue
        other = by_id.setdefault(kind.id, kind)
        if other is not kind and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            msg = f"the id {kind.id!r} belongs to {_path(other)} and to {_path(kind)}; give one of them another"
            raise ConfigError(msg)
        by_id[kind.id] = kind
    return dict(sorted(by_id.items()))


def find_pass(pass_id: str) -> type[GraphPass]:
    """The class of the pass with this id.

    Raises:
        ConfigError: There is none; the sentence names the ids that come near.
    """
    check_pass_ids([pass_id])
    return pass_registry()[pass_id]


def ids_of(given: Any, where: str) -> frozenset[str]:
    """The ids in what a user gave for several of them; a string is one.

    Raises:
        ConfigError: It holds something else; ``where`` is the argument, for the message.
    """
    ids = (given,) if isinstance(given, str) else given
    if isinstance(ids, Iterable):
        found = list(ids)
        if all(isinstance(pass_id, str) for pass_id in found):
            return frozenset(found)
    msg = f"{where}={given!r} must be ids of passes, such as 'tfmq::remove_guards'"
    raise ConfigError(msg)


def check_pass_ids(pass_ids: Iterable[str], *, where: str = "") -> None:
    """Refuse ids that no pass has.

    Args:
        pass_ids: The ids.
        where: What named them, for the message.

    Raises:
        ConfigError: A pass does not exist; the sentence names the ids that come near.
    """
    registry: Mapping[str, type[GraphPass]] = {}
    for pass_id in pass_ids:
        registry = registry or pass_registry()
        if not isinstance(pass_id, str):
            msg = f"{where + ': ' if where else ''}{pass_id!r} is no id of a pass, such as 'tfmq::remove_guards'"
            raise ConfigError(msg)
        if pass_id not in registry:
            near = difflib.get_close_matches(pass_id if "::" in pass_id else f"tfmq::{pass_id}", registry)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(registry)}"
            msg = f"{where + ': ' if where else ''}there is no pass {pass_id!r}; {hint}"
            raise ConfigError(msg)


def _subclasses(kind: Any) -> Iterator[type[GraphPass]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _path(kind: type[GraphPass]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
