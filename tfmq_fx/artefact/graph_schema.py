"""From JSON to torch.export's own objects, one checked field after the other: what is not read here does not exist.

torch's deserializer resolves operators by attribute look-up, hands expressions to sympy, imports modules that a
structure names, and writes names into code that Python then runs. So nothing reaches it but what is built here. The
values of computed nodes are not in the file: they follow from the inputs' (:func:`recompute_values`), and a file
cannot lie about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tfmq_fx._torch.export_schema import export_schema as schema
from tfmq_fx.artefact.arguments import argument, is_constant
from tfmq_fx.artefact.expressions import check_expression
from tfmq_fx.artefact.fields import items, whole
from tfmq_fx.artefact.graph_calls import call_node
from tfmq_fx.artefact.graph_fields import graph_field, is_tensor, value_name
from tfmq_fx.artefact.graph_inputs import MOST_AXES, TENSOR_KINDS, graph_input, tensor_meta
from tfmq_fx.artefact.tree_specs import load_tree_spec
from tfmq_fx.errors import ArtefactError

__all__ = ["exported_program"]

MOST_NODES, MOST_INPUTS = 30_000, 30_000


def exported_program(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The program that torch's deserializer takes, from its JSON.

    Args:
        values: The JSON.
        tensors: The parameters, buffers and constants, by name: no more and no fewer than the graph reads.

    Raises:
        ArtefactError: A field is missing, of another type, or says what no quantized program does.
    """
    module = graph_field(values, "graph_module", dict)
    graph = graph_field(module, "graph", dict)
    metas = graph_field(graph, "tensor_values", dict)
    signature = graph_field(module, "signature", dict)
    specs, inputs = [], []
    for value in items(graph_field(signature, "input_specs", list), "the inputs", MOST_INPUTS):
        spec, input_argument = graph_input(value, metas, tensors)
        specs.append(spec)
        inputs.append(input_argument)
    read_names = {getattr(spec.value, TENSOR_KINDS[spec.type]) for spec in specs if spec.type in TENSOR_KINDS}
    if unread := sorted(tensors.keys() - read_names):
        msg = f"the graph of the artefact does not read tensor {unread[0]!r}; save the program again"
        raise ArtefactError(msg)
    names = [input_argument.as_tensor.name for input_argument in inputs if is_tensor(input_argument)]
    tensor_metas = {name: tensor_meta(metas, name) for name in names}
    sizes: dict[str, Any] = {}
    calls = items(graph_field(graph, "nodes", list), "the nodes", MOST_NODES)
    nodes = [call_node(value, tensor_metas, sizes) for value in calls]
    outputs = [
        argument(value, tensor_metas, sizes) for value in items(graph_field(graph, "outputs", list), "the results")
    ]
    for output in outputs:
        if not (is_tensor(output) or is_constant(output)):
            msg = f"the artefact's graph returns an {output.type}; do not trust this file"
            raise ArtefactError(msg)
    return schema.ExportedProgram(
        graph_module=schema.GraphModule(
            graph=schema.Graph(
                inputs=inputs,
                outputs=outputs,
                nodes=nodes,
                tensor_values=tensor_metas,
                sym_int_values=sizes,
                sym_bool_values={},
            ),
            signature=schema.GraphSignature(
                input_specs=specs,
                output_specs=[
                    schema.OutputSpec.create(user_output=schema.UserOutputSpec(arg=output)) for output in outputs
                ],
            ),
            module_call_graph=[_calling_convention(module, len(specs) - len(read_names), len(outputs))],
        ),
        opset_version={},
        range_constraints=_ranges(graph_field(values, "range_constraints", dict)),
        schema_version=_version(graph_field(values, "schema_version", dict)),
        verifiers=["TRAINING"],
    )


def _calling_convention(module: Mapping[str, Any], inputs: int, outputs: int) -> Any:
    """How the program is called: the structures of its inputs and of its result."""
    calls = items(graph_field(module, "module_call_graph", list), "the calls of the graph")
    signature = graph_field(calls[0] if calls else {}, "signature", dict)
    in_spec, out_spec = graph_field(signature, "in_spec", str), graph_field(signature, "out_spec", str)
    input_tree, output_tree = load_tree_spec(in_spec), load_tree_spec(out_spec)
    names = [value_name(name) for name in items(signature.get("forward_arg_names"), "the names of the arguments")]
    children = input_tree.children()
    fits = input_tree.type is tuple and len(children) == 2 and children[0].type is tuple and children[1].type is dict
    if not fits or input_tree.num_leaves != inputs or output_tree.num_leaves != outputs:
        msg = "the structure of the inputs or of the result does not fit the artefact's graph; save the program again"
        raise ArtefactError(msg)
    keywords = list(children[1].context)
    if len(names) != len(set(names)) or names[children[0].num_children :] != keywords or "self" in names:
        msg = "the names of the arguments do not fit the structure of the inputs; save the program again"
        raise ArtefactError(msg)
    return schema.ModuleCallEntry(
        fqn="",
        signature=schema.ModuleCallSignature(
            inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec, forward_arg_names=names
        ),
    )


def _ranges(values: Mapping[str, Any]) -> dict[str, Any]:
    """The bounds of the symbolic sizes."""
    if len(values) > MOST_AXES:
        msg = f"the artefact's graph has {len(values)} symbolic sizes; do not trust this file"
        raise ArtefactError(msg)
    ranges = {}
    for name, bounds in values.items():
        check_expression(f"Symbol({name!r})")
        least, most = (_bound(graph_field({"x": bounds}, "x", dict).get(key)) for key in ("min_val", "max_val"))
        ranges[name] = schema.RangeConstraint(min_val=least, max_val=most)
    return ranges


def _bound(value: Any) -> int | None:
    return None if value is None else whole(value, "the bound of a size", 0)


def _version(values: Mapping[str, Any]) -> Any:
    numbers = [whole(values.get(key), "the version of the schema", 0, 10**6) for key in ("major", "minor")]
    return schema.SchemaVersion(major=numbers[0], minor=numbers[1])
