"""The calls of a graph, from JSON to torch.export's own objects."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from tfmq_fx._torch.export_schema import export_schema as schema
from tfmq_fx._torch.operators import schema_of
from tfmq_fx.artefact.arguments import argument, results
from tfmq_fx.artefact.fields import checked, items, whole
from tfmq_fx.artefact.graph_fields import graph_field, is_tensor, value_name
from tfmq_fx.artefact.graph_inputs import CPU, ZERO
from tfmq_fx.artefact.operators import FIXED, OPERATORS, PYTHON_OPERATORS
from tfmq_fx.errors import ArtefactError

__all__ = ["call_node"]

#: Where a node comes from: no line of it may end up as code.
STACK = re.compile(r"[^\x00-\x1f\x7f\"'`\\#]{0,20000}")
#: Stands for the value of a computed node until it is computed.
NOT_COMPUTED = schema.TensorMeta(
    dtype=schema.ScalarType.FLOAT, sizes=[], requires_grad=False, device=CPU, strides=[], storage_offset=ZERO,
    layout=schema.Layout.Strided,
)  # fmt: skip


def call_node(value: Any, tensor_metas: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """A call; its results join ``tensor_metas`` and ``sizes``.

    Args:
        value: The JSON.
        tensor_metas: By name, the tensors that were computed before it.
        sizes: By name, the symbolic numbers that were.

    Raises:
        ArtefactError: It calls what no quantized program calls, or a field is wrong.
    """
    target = graph_field(value, "target", str)
    if target not in OPERATORS and target not in PYTHON_OPERATORS:
        msg = (
            f"the artefact's graph calls {target[:120]!r}, which no quantized denoiser contains; do not trust this file"
        )
        raise ArtefactError(msg)
    inputs = [
        _call_argument(entry, target, tensor_metas, sizes)
        for entry in items(graph_field(value, "inputs", list), target)
    ]
    arguments = {entry.name: entry.arg for entry in inputs}
    if (
        "use_input_stats" in arguments
        and arguments["use_input_stats"].value is not False
        and "running_mean" in arguments
    ):
        _require(not is_tensor(arguments["running_mean"]), target, "use_input_stats")
    outputs = []
    for output in items(graph_field(value, "outputs", list), f"the results of {target}"):
        result, names = results(output)
        outputs.append(result)
        for name in map(value_name, names):
            if name in tensor_metas or name in sizes:
                msg = f"two values of the graph are called {name!r}; save the program again"
                raise ArtefactError(msg)
            if result.type in ("as_tensor", "as_tensors"):
                tensor_metas[name] = NOT_COMPUTED
            else:
                sizes[name] = ZERO
    if not outputs:
        msg = f"a call of {target} has no result, and no quantized denoiser has such; do not trust this file"
        raise ArtefactError(msg)
    stack = checked(graph_field(value, "metadata", dict).get("nn_module_stack", ""), str, "a module stack")
    if STACK.fullmatch(stack) is None:
        msg = f"the graph has the module stack {stack[:60]!r}, which is none; do not trust this file"
        raise ArtefactError(msg)
    name = value.get("name")
    return schema.Node(
        target=target,
        inputs=inputs,
        outputs=outputs,
        metadata={"nn_module_stack": stack} if stack else {},
        name=None if name is None else value_name(name),
    )


@functools.cache
def _argument_names(target: str) -> frozenset[str]:
    """What an operator calls its arguments; those of Python's are passed by position."""
    operator: Any = torch
    for part in target.split(".")[1:]:
        operator = getattr(operator, part)
    return frozenset(argument.name for argument in schema_of(operator).arguments)


def _call_argument(value: Any, target: str, tensor_metas: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    """An argument of a call."""
    name = graph_field(value, "name", str)
    kind = whole(value.get("kind"), f"the kind of argument {name[:60]!r}", 1, 2)
    if target in OPERATORS:
        _require(name in _argument_names(target), target, name)
    else:
        _require(kind == schema.ArgumentKind.POSITIONAL and name.isidentifier(), target, name)
    content = argument(value.get("arg"), tensor_metas, sizes, name)
    if name in FIXED:
        _require(type(content.value) is type(FIXED[name]) and content.value == FIXED[name], target, name)
    return schema.NamedArgument(name=name, arg=content, kind=schema.ArgumentKind(kind))


def _require(holds: bool, target: str, name: str) -> None:
    if not holds:
        msg = (
            f"the artefact's graph calls {target} with an argument {name[:60]!r} that it may not have; do not trust it"
        )
        raise ArtefactError(msg)
