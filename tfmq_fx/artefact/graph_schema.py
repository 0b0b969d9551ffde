"""From JSON to torch.export's own objects, one checked field after the other: what is not read here does not exist.

torch's deserializer resolves operators by attribute look-up, hands expressions to sympy, imports modules that a
structure names, and writes names into code that Python then runs. So nothing reaches it but what is built here. The
values of computed nodes are not in the file: they follow from the inputs' (:func:`recompute_values`), and a file
cannot lie about them.
"""

from __future__ import annotations

import functools
import keyword
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tfmq_fx._torch.export_schema import export_schema as schema
from tfmq_fx._torch.export_schema import serialized_dtypes
from tfmq_fx._torch.operators import schema_of
from tfmq_fx.artefact.arguments import argument, is_constant, results
from tfmq_fx.artefact.expressions import check_expression
from tfmq_fx.artefact.fields import checked, identifier, items, whole
from tfmq_fx.artefact.operators import FIXED, OPERATORS, PYTHON_OPERATORS
from tfmq_fx.artefact.tree_specs import load_tree_spec
from tfmq_fx.errors import ArtefactError

__all__ = ["TENSOR_KINDS", "exported_program"]

MOST_NODES, MOST_INPUTS, MOST_AXES = 30_000, 30_000, 16
#: Where the tensors of a graph are; a part of such a name may not stand for anything else of a module.
TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MODULE_ATTRIBUTES = frozenset(dir(nn.Module()))
GRAPH_ATTRIBUTES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
#: Where a node comes from: no line of it may end up as code.
STACK = re.compile(r"[^\x00-\x1f\x7f\"'`\\#]{0,20000}")
#: Kinds of inputs that are tensors of the program itself, and the field that names the tensor.
TENSOR_KINDS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
LARGEST_SIZE, LARGEST_STRIDE = 2**31, 2**48
CPU = schema.Device(type="cpu")
ZERO = schema.SymInt.create(as_int=0)
#: Stands for the value of a computed node until it is computed.
UNKNOWN = schema.TensorMeta(
    dtype=schema.ScalarType.FLOAT, sizes=[], requires_grad=False, device=CPU, strides=[], storage_offset=ZERO,
    layout=schema.Layout.Strided,
)  # fmt: skip
DTYPES = {kind: str(dtype).removeprefix("torch.") for kind, dtype in serialized_dtypes().items()}


def exported_program(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The program that torch's deserializer takes, from its JSON.

    Args:
        values: The JSON.
        tensors: The parameters, buffers and constants, by name: no more and no fewer than the graph reads.

    Raises:
        ArtefactError: A field is missing, of another type, or says what no quantized program does.
    """
    module = _field(values, "graph_module", dict)
    graph = _field(module, "graph", dict)
    metas = _field(graph, "tensor_values", dict)
    specs, inputs = [], []
    for value in items(_field(_field(module, "signature", dict), "input_specs", list), "the inputs", MOST_INPUTS):
        spec, given = _input(value, metas, tensors)
        specs.append(spec)
        inputs.append(given)
    read = {getattr(spec.value, TENSOR_KINDS[spec.type]) for spec in specs if spec.type in TENSOR_KINDS}
    if unread := sorted(tensors.keys() - read):
        msg = f"the graph of the artefact does not read tensor {unread[0]!r}; save the program again"
        raise ArtefactError(msg)
    known = {given.as_tensor.name: _tensor_meta(metas, given.as_tensor.name) for given in inputs if _is_tensor(given)}
    sizes: dict[str, Any] = {}
    nodes = [_node(value, known, sizes) for value in items(_field(graph, "nodes", list), "the nodes", MOST_NODES)]
    outputs = [argument(value, known, sizes) for value in items(_field(graph, "outputs", list), "the results")]
    for output in outputs:
        if not (_is_tensor(output) or is_constant(output)):
            msg = f"the artefact's graph returns an {output.type}; do not trust this file"
            raise ArtefactError(msg)
    return schema.ExportedProgram(
        graph_module=schema.GraphModule(
            graph=schema.Graph(
                inputs=inputs,
                outputs=outputs,
                nodes=nodes,
                tensor_values=known,
                sym_int_values=sizes,
                sym_bool_values={},
            ),
            signature=schema.GraphSignature(
                input_specs=specs,
                output_specs=[
                    schema.OutputSpec.create(user_output=schema.UserOutputSpec(arg=output)) for output in outputs
                ],
            ),
            module_call_graph=[_calling(module, len(specs) - len(read), len(outputs))],
        ),
        opset_version={},
        range_constraints=_ranges(_field(values, "range_constraints", dict)),
        schema_version=_version(_field(values, "schema_version", dict)),
        verifiers=["TRAINING"],
    )


def _field(values: Any, name: str, kind: type) -> Any:
    """A field of an object of the graph."""
    found = checked(values, dict, f"what holds {name!r} in the graph")
    if name not in found:
        msg = f"the graph of the artefact has no field {name!r}; save the program again"
        raise ArtefactError(msg)
    return checked(found[name], kind, f"{name!r} in the graph")


def _is_tensor(given: Any) -> bool:
    return bool(given.type == "as_tensor")


def _value_name(value: Any) -> str:
    name = identifier(value, "the name of a value of the graph")
    if keyword.iskeyword(name):
        msg = f"a value of the graph is called {name!r}, a word of Python; do not trust this file"
        raise ArtefactError(msg)
    return name


def _input(value: Any, metas: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """An input's specification, and the argument of the graph that it is."""
    kind = next(iter(checked(value, dict, "an input of the graph")), "")
    what = _field(value, kind, dict)
    if kind == "constant_input":
        name = _value_name(what.get("name"))
        constant = argument(what.get("value"), {}, {})
        if not is_constant(constant):
            msg = f"input {name!r} of the graph is no constant; do not trust this file"
            raise ArtefactError(msg)
        content = schema.ConstantValue.create(**{str(constant.type): constant.value})
        spec = schema.InputToConstantInputSpec(name=name, value=content)
        return schema.InputSpec.create(constant_input=spec), constant
    if kind != "user_input" and kind not in TENSOR_KINDS:
        msg = f"the artefact's graph has an input of the kind {kind[:60]!r}; do not trust this file"
        raise ArtefactError(msg)
    arg = _field(what, "arg", dict)
    name = _value_name(_field(arg, "as_tensor", dict).get("name") if kind == "user_input" else arg.get("name"))
    tensor = schema.TensorArgument(name=name)
    given = schema.Argument.create(as_tensor=tensor)
    if kind == "user_input":
        return schema.InputSpec.create(user_input=schema.UserInputSpec(arg=given)), given
    target = _tensor_name(what.get(TENSOR_KINDS[kind]))
    if target not in tensors:
        msg = f"the graph of the artefact reads tensor {target!r}, which it does not have; save the program again"
        raise ArtefactError(msg)
    _check_like(_tensor_meta(metas, name), tensors[target], target)
    if kind == "parameter":
        made = schema.InputToParameterSpec(arg=tensor, parameter_name=target)
    elif kind == "buffer":
        persistent = checked(what.get("persistent"), bool, f"'persistent' of {target!r}")
        made = schema.InputToBufferSpec(arg=tensor, buffer_name=target, persistent=persistent)
    else:
        made = schema.InputToTensorConstantSpec(arg=tensor, tensor_constant_name=target)
    return schema.InputSpec.create(**{kind: made}), given


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


def _tensor_meta(metas: Mapping[str, Any], name: str) -> Any:
    """What is known of an input: its dtype, sizes and strides."""
    value = _field(metas, name, dict)
    device, layout = _field(value, "device", dict), value.get("layout")
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
    expression = _field(value, "as_expr", dict)
    text = _field(expression, "expr_str", str)
    check_expression(text)
    hint = whole(_field(expression, "hint", dict).get("as_int"), what, 1, most)
    number = schema.SymExprHint.create(as_int=hint)
    return schema.SymInt.create(as_expr=schema.SymExpr(expr_str=text, hint=number))


def _check_like(meta: Any, tensor: Tensor, name: str) -> None:
    """The tensor that was read is the one that the graph was saved with."""
    sizes = [size.value for size in meta.sizes]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if sizes != list(tensor.shape) or DTYPES.get(meta.dtype) != dtype:
        msg = (
            f"tensor {name!r} is {list(tensor.shape)} of {dtype}, and the graph reads {str(sizes)[:80]} of "
            f"{DTYPES.get(meta.dtype, 'an unknown dtype')}; save the program again"
        )
        raise ArtefactError(msg)


def _node(value: Any, known: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """A call; its results join ``known`` and ``sizes``."""
    target = _field(value, "target", str)
    if target not in OPERATORS and target not in PYTHON_OPERATORS:
        msg = (
            f"the artefact's graph calls {target[:120]!r}, which no quantized denoiser contains; do not trust this file"
        )
        raise ArtefactError(msg)
    inputs = [_named(named, target, known, sizes) for named in items(_field(value, "inputs", list), target)]
    given = {named.name: named.arg for named in inputs}
    if "use_input_stats" in given and given["use_input_stats"].value is not False and "running_mean" in given:
        _require(not _is_tensor(given["running_mean"]), target, "use_input_stats")
    outputs = []
    for output in items(_field(value, "outputs", list), f"the results of {target}"):
        made, names = results(output)
        outputs.append(made)
        for name in map(_value_name, names):
            if name in known or name in sizes:
                msg = f"two values of the graph are called {name!r}; save the program again"
                raise ArtefactError(msg)
            if made.type in ("as_tensor", "as_tensors"):
                known[name] = UNKNOWN
            else:
                sizes[name] = ZERO
    if not outputs:
        msg = f"a call of {target} has no result, and no quantized denoiser has such; do not trust this file"
        raise ArtefactError(msg)
    stack = checked(_field(value, "metadata", dict).get("nn_module_stack", ""), str, "a module stack")
    if STACK.fullmatch(stack) is None:
        msg = f"the graph has the module stack {stack[:60]!r}, which is none; do not trust this file"
        raise ArtefactError(msg)
    name = value.get("name")
    return schema.Node(
        target=target,
        inputs=inputs,
        outputs=outputs,
        metadata={"nn_module_stack": stack} if stack else {},
        name=None if name is None else _value_name(name),
    )


@functools.cache
def _argument_names(target: str) -> frozenset[str]:
    """What an operator calls its arguments; those of Python's are passed by position."""
    found: Any = torch
    for part in target.split(".")[1:]:
        found = getattr(found, part)
    return frozenset(argument.name for argument in schema_of(found).arguments)


def _named(value: Any, target: str, known: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """An argument of a call."""
    name = _field(value, "name", str)
    kind = whole(value.get("kind"), f"the kind of argument {name[:60]!r}", 1, 2)
    if target in OPERATORS:
        _require(name in _argument_names(target), target, name)
    else:
        _require(kind == schema.ArgumentKind.POSITIONAL and name.isidentifier(), target, name)
    made = argument(value.get("arg"), known, sizes, name)
    if name in FIXED:
        _require(type(made.value) is type(FIXED[name]) and made.value == FIXED[name], target, name)
    return schema.NamedArgument(name=name, arg=made, kind=schema.ArgumentKind(kind))


def _require(holds: bool, target: str, name: str) -> None:
    if not holds:
        msg = (
            f"the artefact's graph calls {target} with an argument {name[:60]!r} that it may not have; do not trust it"
        )
        raise ArtefactError(msg)


def _calling(module: Mapping[str, Any], inputs: int, outputs: int) -> Any:
    """How the program is called: the structures of its inputs and of its result."""
    calls = items(_field(module, "module_call_graph", list), "the calls of the graph")
    signature = _field(calls[0] if calls else {}, "signature", dict)
    before, after = _field(signature, "in_spec", str), _field(signature, "out_spec", str)
    called, returned = load_tree_spec(before), load_tree_spec(after)
    names = [_value_name(name) for name in items(signature.get("forward_arg_names"), "the names of the arguments")]
    children = called.children()
    fits = called.type is tuple and len(children) == 2 and children[0].type is tuple and children[1].type is dict
    if not fits or called.num_leaves != inputs or returned.num_leaves != outputs:
        msg = "the structure of the inputs or of the result does not fit the artefact's graph; save the program again"
        raise ArtefactError(msg)
    keywords = list(children[1].context)
    if len(names) != len(set(names)) or names[children[0].num_children :] != keywords or "self" in names:
        msg = "the names of the arguments do not fit the structure of the inputs; save the program again"
        raise ArtefactError(msg)
    return schema.ModuleCallEntry(
        fqn="",
        signature=schema.ModuleCallSignature(
            inputs=[], outputs=[], in_spec=before, out_spec=after, forward_arg_names=names
        ),
    )


def _ranges(values: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds of the symbolic sizes."""
    if len(values) > MOST_AXES:
        msg = f"the artefact's graph has {len(values)} symbolic sizes; do not trust this file"
        raise ArtefactError(msg)
    found = {}
    for name, bounds in values.items():
        check_expression(f"Symbol({name!r})")
        least, most = (_bound(_field({"x": bounds}, "x", dict).get(key)) for key in ("min_val", "max_val"))
        found[name] = schema.RangeConstraint(min_val=least, max_val=most)
    return found


def _bound(value: Any) -> int | None:
    return None if value is None else whole(value, "the bound of a size", 0)


def _version(values: Mapping[str, Any]) -> Any:
    numbers = [whole(values.get(key), "the version of the schema", 0, 10**6) for key in ("major", "minor")]
    return schema.SchemaVersion(major=numbers[0], minor=numbers[1])
