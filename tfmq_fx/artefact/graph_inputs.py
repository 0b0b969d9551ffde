"""The inputs of a graph, from JSON to torch.export's own objects: arguments of the call, constants, and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from tfmq_fx._torch.export_schema import export_schema as schema
from tfmq_fx._torch.export_schema import serialized_dtypes
from tfmq_fx.artefact.arguments import argument, is_constant
from tfmq_fx.artefact.expressions import check_expression
from tfmq_fx.artefact.fields import checked, items, whole
from tfmq_fx.artefact.graph_fields import graph_field, value_name
from tfmq_fx.errors import ArtefactError

__all__ = ["CPU", "MOST_AXES", "TENSOR_KINDS", "ZERO", "graph_input", "tensor_meta"]

MOST_AXES = 16
#: Where the tensors of a graph are; a part of such a name may not stand for anything else of a module.
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_][A-Za-z0-9_-]*)*")
MODULE_ATTRIBUTES = frozenset(dir(nn.Module()))
GRAPH_ATTRIBUTES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
#: Kinds of inputs that are tensors of the program itself, and the field that names the tensor.
TENSOR_KINDS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
LARGEST_SIZE, LARGEST_STRIDE = 2**31, 2**48
CPU = schema.Device(type="cpu")
ZERO = schema.SymInt.create(as_int=0)
DTYPE_NAMES = {kind: str(dtype).removeprefix("torch.") for kind, dtype in serialized_dtypes().items()}


def graph_input(value: Any, metas: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """An input's specification, and the argument of the graph that it is.

    Args:
        value: The JSON.
        metas: By name, the JSON of the dtype, sizes and strides of each tensor.
        tensors: The tensors of the program, by name.

    Raises:
        ArtefactError: A field is wrong, or a tensor is not there or not as the graph reads it.
    """
    kind = next(iter(checked(value, dict, "an input of the graph")), "")
    entry = graph_field(value, kind, dict)
    if kind == "constant_input":
        name = value_name(entry.get("name"))
        constant = argument(entry.get("value"), {}, {})
        if not is_constant(constant):
            msg = f"input {name!r} of the graph is no constant; do not trust this file"
            raise ArtefactError(msg)
        content = schema.ConstantValue.create(**{str(constant.type): constant.value})
        constant_spec = schema.InputToConstantInputSpec(name=name, value=content)
        return schema.InputSpec.create(constant_input=constant_spec), constant
    if kind != "user_input" and kind not in TENSOR_KINDS:
        msg = f"the artefact's graph has an input of the kind {kind[:60]!r}; do not trust this file"
        raise ArtefactError(msg)
    arg = graph_field(entry, "arg", dict)
    name = value_name(graph_field(arg, "as_tensor", dict).get("name") if kind == "user_input" else arg.get("name"))
    tensor = schema.TensorArgument(name=name)
    tensor_argument = schema.Argument.create(as_tensor=tensor)
    if kind == "user_input":
        return schema.InputSpec.create(user_input=schema.UserInputSpec(arg=tensor_argument)), tensor_argument
    target = _tensor_name(entry.get(TENSOR_KINDS[kind]))
    if target not in tensors:
        msg = f"the graph of the artefact reads tensor {target!r}, which it does not have; save the program again"
        raise ArtefactError(msg)
    _check_tensor(tensor_meta(metas, name), tensors[target], target)
    if kind == "parameter":
        spec = schema.InputToParameterSpec(arg=tensor, parameter_name=target)
    elif kind == "buffer":
        persistent = checked(entry.get("persistent"), bool, f"'persistent' of {target!r}")
        spec = schema.InputToBufferSpec(arg=tensor, buffer_name=target, persistent=persistent)
    else:
        spec = schema.InputToTensorConstantSpec(arg=tensor, tensor_constant_name=target)
    return schema.InputSpec.create(**{kind: spec}), tensor_argument


def _tensor_name(value: Any) -> str:
    """The name of a tensor of the program, which may be no attribute that modules have by themselves."""
    name: str = checked(value, str, "the name of a tensor of the graph")
    first, *_ = parts = name.split(".")
    if (
        len(name) > 1000
        or TENSOR_NAME.fullmatch(name) is None
        or first in GRAPH_ATTRIBUTES
        or not MODULE_ATTRIBUTES.isdisjoint(parts)
    ):
        msg = f"a tensor of the artefact is called {name[:60]!r}, which no tensor of a program is; do not trust it"
        raise ArtefactError(msg)
    return name


def tensor_meta(metas: Mapping[str, Any], name: str) -> Any:
    """What is known of an input: its dtype, sizes and strides.

    Raises:
        ArtefactError: A field is wrong.
    """
    value = graph_field(metas, name, dict)
    device, layout = graph_field(value, "device", dict), value.get("layout")
    if device.get("type") != "cpu" or device.get("index") is not None or layout != schema.Layout.Strided:
        msg = f"input {name!r} of the graph is no plain tensor of the CPU; save the program again"
        raise ArtefactError(msg)
    dtype = checked(value.get("dtype"), int, f"the dtype of {name!r}")
    if dtype not in set(schema.ScalarType):
        msg = f"input {name!r} of the graph has no dtype of torch; save the program again"
        raise ArtefactError(msg)
    sizes = items(value.get("sizes"), f"the sizes of {name!r}", MOST_AXES)
    strides = items(value.get("strides"), f"the strides of {name!r}", MOST_AXES)
    return schema.TensorMeta(
        dtype=schema.ScalarType(dtype),
        sizes=[_size(size, name, LARGEST_SIZE) for size in sizes],
        requires_grad=False,
        device=CPU,
        strides=[_size(stride, name, LARGEST_STRIDE) for stride in strides],
        storage_offset=ZERO,
        layout=schema.Layout.Strided,
    )


def _size(value: Any, name: str, most: int) -> Any:
    what = f"a size of {name!r}"
    if set(checked(value, dict, what)) == {"as_int"}:
        return schema.SymInt.create(as_int=whole(value["as_int"], what, 0, most))
    expression = graph_field(value, "as_expr", dict)
    text = graph_field(expression, "expr_str", str)
    check_expression(text)
    hint = whole(graph_field(expression, "hint", dict).get("as_int"), what, 1, most)
    number = schema.SymExprHint.create(as_int=hint)
    return schema.SymInt.create(as_expr=schema.SymExpr(expr_str=text, hint=number))


def _check_tensor(meta: Any, tensor: Tensor, name: str) -> None:
    """The tensor that was read is the one that the graph was saved with."""
    sizes = [size.value for size in meta.sizes]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if sizes != list(tensor.shape) or DTYPE_NAMES.get(meta.dtype) != dtype:
        msg = (
            f"tensor {name!r} is {list(tensor.shape)} of {dtype}, and the graph reads {str(sizes)[:80]} of "
            f"{DTYPE_NAMES.get(meta.dtype, 'an unknown dtype')}; save the program again"
        )
        raise ArtefactError(msg)
