"""Check a serialized pytree structure before torch reads it: torch imports whatever module some of them name."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from tfmq_fx._torch import pytree
from tfmq_fx._torch.pytree import serialized_node_types
from tfmq_fx.artefact.fields import checked, fields_of, items, parse_json
from tfmq_fx.errors import ArtefactError

__all__ = ["check_tree_spec", "load_tree_spec"]

PROTOCOL = 1
#: The bytes of one structure, and its nodes: a call of a denoiser has some dozens.
MOST_BYTES, MOST_NODES, MOST_DEPTH = 2**20, 100_000, 64
SEQUENCES = ("builtins.tuple", "builtins.list")
MAPPINGS = ("builtins.dict", "collections.OrderedDict")
#: An output class of a model of diffusers; importing its module registers it.
OUTPUT_CLASS = re.compile(r"(diffusers\.models(?:\.[a-z_][a-z0-9_]*)+)\.([A-Z]\w*Output)", re.ASCII)
#: A key of a dictionary: generated code holds it between quotes.
KEY = re.compile(r"[\w .:/-]{0,256}")


def load_tree_spec(text: str) -> pytree.TreeSpec:
    """The structure that :func:`check_tree_spec` admits.

    Raises:
        ArtefactError: It holds what is on no list.
    """
    check_tree_spec(text)
    try:
        return pytree.treespec_loads(text)
    except Exception as error:
        msg = f"a structure of the artefact does not fit this torch ({type(error).__name__}); save the program again"
        raise ArtefactError(msg) from error


def check_tree_spec(text: str) -> None:
    """Check a structure that ``torch.utils._pytree.treespec_dumps`` wrote, and register what it needs.

    Tuples, lists, dictionaries and None are admitted, the output classes of diffusers' models, whose modules are
    imported, and output dataclasses that this process has registered itself. Nothing else is imported.

    Raises:
        ArtefactError: It holds what is on no list.
    """
    values = items(parse_json(checked(text, str, "a structure").encode(), "a structure", MOST_BYTES), "a structure")
    if len(values) != 2 or type(values[0]) is not int or values[0] != PROTOCOL:
        msg = f"a structure is not of protocol {PROTOCOL} of torch's pytrees; save the program with this torch"
        raise ArtefactError(msg)
    count = _check_node(values[1], 0)
    if count > MOST_NODES:
        msg = f"a structure has {count} nodes, more than any model's inputs and outputs; do not trust this file"
        raise ArtefactError(msg)


def _check_node(values: Any, depth: int) -> int:
    """Check a node and what is under it; return how many nodes that is."""
    node = fields_of(values, ("type", "context", "children_spec"), "a node of a structure")
    kind = checked(node["type"], (str, type(None)), "the type of a node of a structure")
    children = items(node["children_spec"], "the children of a node of a structure", MOST_NODES)
    if depth > MOST_DEPTH:
        msg = f"a structure is nested deeper than {MOST_DEPTH} nodes; do not trust this file"
        raise ArtefactError(msg)
    if kind is None:
        if node["context"] is not None or children:
            _refuse("a leaf with contents")
    else:
        # Contexts are JSON in a text: torch reads some objects in it as enumerations, and imports their modules.
        context = parse_json(checked(node["context"], str, f"the context of {kind[:60]!r}").encode(), kind, MOST_BYTES)
        _check_context(kind, context, len(children))
    return 1 + sum(_check_node(child, depth + 1) for child in children)


def _check_context(kind: str, context: Any, children: int) -> None:
    if kind in SEQUENCES:
        fits = context is None
    elif kind in MAPPINGS:
        fits = _is_keys(context, children)
    else:
        names = _output_fields(kind)
        if type(context) is list and len(context) == 2 and all(type(part) is list for part in context):
            # How torch writes a dataclass: the fields with a value, and those that are None.
            fits = _is_keys(context[0], children) and _is_keys(context[1], len(context[1]))
            context = [*context[0], *context[1]]
        else:
            fits = _is_keys(context, children)
        fits = fits and set(context) <= names
    if not fits:
        _refuse(f"a {kind} whose context is {str(context)[:60]!r}")


def _is_keys(context: Any, children: int) -> bool:
    """Whether ``context`` is one key for each child."""
    return (
        type(context) is list
        and len(context) == len(set(map(str, context))) == children
        and all(type(key) is int or (type(key) is str and KEY.fullmatch(key) is not None) for key in context)
    )


def _output_fields(kind: str) -> set[str]:
    """The names of the fields of a registered output dataclass; those of diffusers are imported first."""
    match = OUTPUT_CLASS.fullmatch(kind)
    if match is not None and _defines(*match.groups()):
        importlib.import_module(match.group(1))
    registered = serialized_node_types().get(kind)
    named = f"{registered.__module__}.{registered.__qualname__}" if registered else ""
    if registered is None or named != kind or not is_dataclass(registered):
        _refuse(f"a {kind[:120]!r}: register that output dataclass first, if the model is your own")
    return {field.name for field in fields(registered)}


def _defines(module: str, name: str) -> bool:
    """Whether a file of diffusers holds such an output class, found without running it."""
    diffusers = importlib.util.find_spec("diffusers")
    if diffusers is None or diffusers.origin is None:
        return False
    file = Path(diffusers.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return file.is_file() and f"class {name}(BaseOutput):" in file.read_text(encoding="utf-8")


def _refuse(what: str) -> NoReturn:
    msg = f"a structure of the artefact holds {what}; it may hold tuples, lists, dictionaries and outputs of models"
    raise ArtefactError(msg)
