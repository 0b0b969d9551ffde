"""Names for the leaves of a call's arguments: the argument, with the path inside it."""

from __future__ import annotations

from typing import Any

from tfmq_fx._torch import pytree

__all__ = ["dict_keys", "leaf_names"]


def leaf_names(names: list[str], spec: pytree.TreeSpec) -> list[str]:
    """A name for every leaf of ``((args), {kwargs})``: the argument, with the path inside it."""
    args, kwargs = spec.children()
    arguments = [*args.children(), *kwargs.children()]
    leaves: list[str] = []
    for name, argument in zip(names, arguments, strict=True):
        _append_leaf_names(argument, name, leaves)
    return leaves


def _append_leaf_names(spec: pytree.TreeSpec, name: str, leaves: list[str]) -> None:
    if spec.is_leaf():
        leaves.append(name)
        return
    keys = dict_keys(spec)
    for index, child in enumerate(spec.children()):
        _append_leaf_names(child, f"{name}[{index if keys is None else repr(keys[index])}]", leaves)


def dict_keys(spec: pytree.TreeSpec) -> list[Any] | None:
    """The keys of a dictionary's structure; None for another one."""
    if not (isinstance(spec.type, type) and issubclass(spec.type, dict)):
        return None
    context = spec.context
    return list(context[1]) if len(context) == 2 and isinstance(context[1], list) else list(context)
