"""An interface as JSON values, and back with every value checked: the values may come from anyone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch

from tfmq_fx._torch import pytree
from tfmq_fx.errors import ArtefactError
from tfmq_fx.frontend.interface import ConstantInput, Input, Interface, Parameter, TensorInput
from tfmq_fx.frontend.sizes import BatchSize, Size

__all__ = ["interface_from_json", "interface_to_json", "model_from_json", "model_to_json"]

#: Dtypes that an input may have, by name.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool)
}  # fmt: skip
#: What the values have: of a model, and of a call.
MODEL_FIELDS = {"model_class", "config", "parameters", "max_batch", "route"}
CALL_FIELDS = {"names", "spec", "inputs", "results"}
SCALARS = (type(None), bool, int, float, str)


def model_to_json(interface: Interface) -> dict[str, Any]:
    """What a graph does not say by itself: the model's class, configuration and parameters, and the largest batch."""
    return {
        "model_class": interface.model_class,
        "config": interface.config,
        "parameters": [asdict(parameter) for parameter in interface.parameters],
        "max_batch": interface.max_batch,
        "route": interface.route,
    }


def model_from_json(interface: Interface, values: Any) -> Interface:
    """``interface``, as it is read off a graph, with what :func:`model_to_json` wrote.

    Raises:
        ArtefactError: A value is missing or of another type.
    """
    values = _mapping(values, "interface")
    if unknown := sorted(values.keys() - MODEL_FIELDS - CALL_FIELDS):
        _refuse("interface", unknown[0])
    if missing := sorted(MODEL_FIELDS - values.keys()):
        msg = f"interface has no field {missing[0]!r}; the file was changed, save the program again"
        raise ArtefactError(msg)
    parameters = tuple(_parameter(item) for item in _list(values["parameters"], "interface.parameters"))
    if repeated := len(parameters) - len({parameter.name for parameter in parameters}):
        msg = f"interface.parameters names {repeated} parameters twice; save the program again"
        raise ArtefactError(msg)
    limit = values["max_batch"]
    if limit is not None and not (type(limit) is int and limit >= 1):
        _refuse("interface.max_batch", limit)
    return replace(
        interface,
        model_class=_text(values["model_class"], "interface.model_class"),
        config=_mapping(values["config"], "interface.config"),
        parameters=parameters,
        max_batch=limit,
        route=_text(values["route"], "interface.route"),
    )


def interface_to_json(interface: Interface) -> dict[str, Any]:
    """All of it, for a package, which has no graph."""
    return {
        **model_to_json(interface),
        "names": list(interface.names),
        "spec": pytree.treespec_dumps(interface.spec),
        "inputs": [_input_to_json(leaf) for leaf in interface.inputs],
        "results": list(interface.results),
    }


def interface_from_json(values: Any, load_spec: Callable[[str], pytree.TreeSpec]) -> Interface:
    """The inverse of :func:`interface_to_json`.

    Args:
        values: The values.
        load_spec: Reads a structure from its text, and refuses one that is not of lists, tuples and dictionaries.

    Raises:
        ArtefactError: A value is missing, of another type, or does not go with the others.
    """
    values = _mapping(values, "interface")
    spec = load_spec(_text(values.get("spec"), "interface.spec"))
    names = tuple(_text(name, "interface.names") for name in _list(values.get("names"), "interface.names"))
    inputs = tuple(_input_from_json(leaf) for leaf in _list(values.get("inputs"), "interface.inputs"))
    results = tuple(_list(values.get("results"), "interface.results"))
    if any(axis is not None and not (type(axis) is int and 0 <= axis < 64) for axis in results):
        _refuse("interface.results", results)
    shape = [child.type for child in spec.children()]
    arguments = sum(child.num_children for child in spec.children())
    if shape != [tuple, dict] or arguments != len(names) or spec.num_leaves != len(inputs):
        msg = "interface.spec does not go with its names and inputs; save the program again"
        raise ArtefactError(msg)
    return model_from_json(Interface(names, spec, inputs, results=results), values)


def _input_to_json(leaf: Input) -> dict[str, Any]:
    if isinstance(leaf, ConstantInput):
        return {"name": leaf.name, "value": leaf.value}
    sizes = [size if isinstance(size, int) else {"batch": size.times} for size in leaf.sizes]
    dtype = str(leaf.dtype).removeprefix("torch.")
    return {"name": leaf.name, "sizes": sizes, "dtype": dtype, "device": leaf.device, "mask": leaf.mask}


def _input_from_json(value: Any) -> Input:
    leaf = _mapping(value, "interface.inputs")
    name = _text(leaf.get("name"), "interface.inputs.name")
    if "value" in leaf:
        if not isinstance(leaf["value"], SCALARS):
            _refuse(f"the value of input {name!r}", leaf["value"])
        return ConstantInput(name, leaf["value"])
    sizes = tuple(_size(size, name) for size in _list(leaf.get("sizes"), "interface.inputs.sizes"))
    dtype = DTYPES.get(leaf["dtype"]) if isinstance(leaf.get("dtype"), str) else None
    if dtype is None:
        _refuse(f"the dtype of input {name!r}", leaf.get("dtype"))
    if type(leaf.get("mask")) is not bool or leaf.get("device") not in ("cpu", "cuda"):
        _refuse(f"input {name!r}", leaf)
    return TensorInput(name, sizes, dtype, leaf["device"], leaf["mask"])


def _size(value: Any, name: str) -> Size:
    times = value.get("batch") if isinstance(value, dict) and len(value) == 1 else None
    number = value if times is None else times
    if type(number) is not int or not (0 if times is None else 1) <= number < 2**40:
        _refuse(f"a size of input {name!r}", value)
    return int(number) if times is None else BatchSize(int(number))


def _parameter(value: Any) -> Parameter:
    fields = _mapping(value, "interface.parameters")
    flags = [fields.get(name) for name in ("required", "plain", "positional")]
    default = fields.get("default")
    if any(type(flag) is not bool for flag in flags) or not isinstance(default, SCALARS):
        _refuse("interface.parameters", value)
    required, plain, positional = (bool(flag) for flag in flags)
    return Parameter(_text(fields.get("name"), "interface.parameters.name"), required, plain, default, positional)


def _mapping(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(field, value)
    return dict(value)


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(field, value)
    return list(value)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        _refuse(field, value)
    return str(value)


def _refuse(field: str, value: object) -> NoReturn:
    msg = f"{field} is {str(value)[:60]!r}, which is not what was saved there; save the program again"
    raise ArtefactError(msg)
