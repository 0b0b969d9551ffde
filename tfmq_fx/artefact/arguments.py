"""Arguments and results of the calls of a graph, from JSON to torch.export's own objects."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tfmq_fx._torch.export_schema import export_schema as schema
from tfmq_fx.artefact.fields import checked, items, whole
from tfmq_fx.artefact.operators import TEXTS
from tfmq_fx.errors import ArtefactError

__all__ = ["argument", "is_constant", "results"]

Names = Collection[str]

MOST_ITEMS = 100_000
SMALLEST = -(2**63)
CONSTANTS = ("as_none", "as_int", "as_float", "as_bool", "as_string")
#: A text among the inputs, such as the name of a mode: nothing that could end a quotation.
PLAIN_TEXT = re.compile(r"[\w .:/-]{0,256}")


def argument(value: Any, tensors: Names, sizes: Names, name: str | None = None) -> Any:
    """An argument of a call, or an input or result of the graph.

    Args:
        value: The JSON: an object with one field, which says what it is.
        tensors: The tensors that it may name.
        sizes: The symbolic numbers that it may name.
        name: What the operator calls the argument; None where it belongs to none.

    Raises:
        ArtefactError: It is none, or of a kind that no quantized program has.
    """
    kind, content = _only_field(value)
    what = f"argument {name!r}" if name else "an input or result of the graph"
    argument_value: Any
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        argument_value = _reference(kind, content, tensors, sizes, what)
    elif kind == "as_tensors":
        argument_value = [
            _reference("as_tensor", item, tensors, sizes, what) for item in items(content, what, MOST_ITEMS)
        ]
    elif kind == "as_optional_tensors":
        argument_value = [_optional(item, tensors, sizes, what) for item in items(content, what, MOST_ITEMS)]
    elif kind == "as_sym_ints":
        argument_value = [
            _reference("as_sym_int", item, tensors, sizes, what) for item in items(content, what, MOST_ITEMS)
        ]
    elif kind in LISTS:
        argument_value = [LISTS[kind](item, what) for item in items(content, what, MOST_ITEMS)]
    elif kind == "as_string":
        argument_value = _text(content, name, what)
    elif kind in VALUES:
        argument_value = VALUES[kind](content, what)
    else:
        msg = f"{what} is of the kind {kind[:60]!r}, which no quantized program has; do not trust this file"
        raise ArtefactError(msg)
    return schema.Argument.create(**{kind: argument_value})


def is_constant(candidate: Any) -> bool:
    """Whether an argument is a plain value."""
    return str(candidate.type) in CONSTANTS


def results(value: Any) -> tuple[Any, list[str]]:
    """A result of a call, and the names that it gives to tensors or numbers.

    Raises:
        ArtefactError: It is none.
    """
    kind, content = _only_field(value)
    what = "a result of a call"
    if kind == "as_tensors":
        names = [_name(item, "name", what) for item in items(content, what, MOST_ITEMS)]
        if names:
            return schema.Argument.create(as_tensors=[schema.TensorArgument(name=name) for name in names]), names
    if kind == "as_tensor":
        name = _name(content, "name", what)
        return schema.Argument.create(as_tensor=schema.TensorArgument(name=name)), [name]
    if kind in REFERENCES:
        name = _name(content, "as_name", what)
        return schema.Argument.create(**{kind: REFERENCES[kind].create(as_name=name)}), [name]
    msg = f"{what} is of the kind {kind[:60]!r}, which no quantized program has; do not trust this file"
    raise ArtefactError(msg)


def _only_field(value: Any) -> tuple[str, Any]:
    fields = checked(value, dict, "an argument in the graph")
    if len(fields) != 1:
        msg = f"an argument in the graph has {len(fields)} fields instead of one; save the program again"
        raise ArtefactError(msg)
    kind, content = next(iter(fields.items()))
    return kind, content


def _name(value: Any, field: str, what: str) -> str:
    name: str = checked(checked(value, dict, what).get(field), str, what)
    return name


def _reference(kind: str, value: Any, tensors: Names, sizes: Names, what: str) -> Any:
    """A tensor or number by its name; a number among symbolic ones may stand there itself."""
    if kind != "as_tensor" and checked(value, dict, what).keys() == {"as_int"} and kind == "as_sym_int":
        return schema.SymIntArgument.create(as_int=_integer(value["as_int"], what))
    name = _name(value, "name" if kind == "as_tensor" else "as_name", what)
    if name not in (tensors if kind == "as_tensor" else sizes):
        msg = f"{what} is {name[:60]!r}, which the graph has not computed there; save the program again"
        raise ArtefactError(msg)
    return schema.TensorArgument(name=name) if kind == "as_tensor" else REFERENCES[kind].create(as_name=name)


def _optional(value: Any, tensors: Names, sizes: Names, what: str) -> Any:
    kind, content = _only_field(value)
    if kind == "as_none":
        return schema.OptionalTensorArgument.create(as_none=True)
    return schema.OptionalTensorArgument.create(as_tensor=_reference("as_tensor", content, tensors, sizes, what))


def _text(value: Any, name: str | None, what: str) -> str:
    """A text of the few that operators take, or a plain one among the inputs."""
    text: str = checked(value, str, what)
    pattern = PLAIN_TEXT.pattern if name is None else TEXTS.get(name)
    if pattern is None or re.fullmatch(pattern, text, re.ASCII) is None:
        msg = f"{what} is the text {text[:60]!r}, which no quantized program passes; do not trust this file"
        raise ArtefactError(msg)
    return text


def _integer(value: Any, what: str) -> int:
    return whole(value, what, SMALLEST)


def _number(value: Any, what: str) -> float:
    # JSON has no infinity: torch writes it as a text.
    if isinstance(value, str) and value in ("Infinity", "-Infinity"):
        return float(value)
    return float(checked(value, (float, int), what))


def _boolean(value: Any, what: str) -> bool:
    return bool(checked(value, bool, what))


def _none(value: Any, what: str) -> bool:
    return _boolean(value, what)


def _dtype(value: Any, what: str) -> Any:
    return _member(schema.ScalarType, value, what)


def _memory_format(value: Any, what: str) -> Any:
    return _member(schema.MemoryFormat, value, what)


def _layout(value: Any, what: str) -> Any:
    if _member(schema.Layout, value, what) is not schema.Layout.Strided:
        msg = f"{what} is a layout other than strided, which no quantized program has; do not trust this file"
        raise ArtefactError(msg)
    return schema.Layout.Strided


def _member(kinds: Any, value: Any, what: str) -> Any:
    number = whole(value, what)
    if number not in {int(kind) for kind in kinds}:
        msg = f"{what} is {number}, which is no {kinds.__name__}; save the program again"
        raise ArtefactError(msg)
    return kinds(number)


def _device(value: Any, what: str) -> Any:
    fields = checked(value, dict, what)
    if fields.get("type") != "cpu" or fields.get("index") is not None:
        msg = f"{what} is a device other than the CPU; save the program again"
        raise ArtefactError(msg)
    return schema.Device(type="cpu")


REFERENCES = {
    "as_sym_int": schema.SymIntArgument,
    "as_sym_float": schema.SymFloatArgument,
    "as_sym_bool": schema.SymBoolArgument,
}
LISTS = {"as_ints": _integer, "as_floats": _number, "as_bools": _boolean}
VALUES = {
    "as_none": _none,
    "as_int": _integer,
    "as_float": _number,
    "as_bool": _boolean,
    "as_scalar_type": _dtype,
    "as_memory_format": _memory_format,
    "as_layout": _layout,
    "as_device": _device,
}
