"""Fields of a graph's JSON, and the names of its values."""

from __future__ import annotations

import keyword
from typing import Any

from tfmq_fx.artefact.fields import checked, identifier
from tfmq_fx.errors import ArtefactError

__all__ = ["graph_field", "is_tensor", "value_name"]


def graph_field(values: Any, name: str, kind: type) -> Any:
    """A field of an object of the graph.

    Raises:
        ArtefactError: It is missing, or of another type.
    """
    fields = checked(values, dict, f"what holds {name!r} in the graph")
    if name not in fields:
        msg = f"the graph of the artefact has no field {name!r}; save the program again"
        raise ArtefactError(msg)
    return checked(fields[name], kind, f"{name!r} in the graph")


def is_tensor(argument: Any) -> bool:
    """Whether an argument of torch.export's schema is a tensor."""
    return bool(argument.type == "as_tensor")


def value_name(value: Any) -> str:
    """A name that a value of the graph may have.

    Raises:
        ArtefactError: It is none, or a word of Python.
    """
    name = identifier(value, "the name of a value of the graph")
    if keyword.iskeyword(name):
        msg = f"a value of the graph is called {name!r}, a word of Python; do not trust this file"
        raise ArtefactError(msg)
    return name
