"""The graph as gzipped JSON in torch.export's own schema, without what can be computed from the rest."""

from __future__ import annotations

import json
import zlib
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from tfmq_fx._torch.export_schema import exported_from_schema, exported_to_json
from tfmq_fx.artefact.fields import parse_json
from tfmq_fx.artefact.graph_inputs import TENSOR_KINDS
from tfmq_fx.artefact.graph_schema import exported_program
from tfmq_fx.errors import ArtefactError
from tfmq_fx.passes import (
    FillUninitialized,
    PropagateValues,
    RemoveDropouts,
    RemoveGuards,
    ReplaceInPlace,
    StripDeadState,
    run_pipeline,
)

__all__ = ["MOST_GRAPH_BYTES", "graph_from_bytes", "graph_to_json"]

#: The JSON of a graph before compression. The largest of diffusers' models have some 20 MiB.
MOST_GRAPH_BYTES = 2**26


def graph_to_json(program: ExportedProgram) -> bytes:
    """Serialize the graph of an exported program (without tensors) to JSON that :func:`graph_from_bytes` admits.

    Assertions that the export put into the graph are taken out of it, and what writes into a value computes a new one.

    Raises:
        ArtefactError: The graph holds what an artefact cannot.
    """
    run_pipeline(program.graph_module, (RemoveGuards, ReplaceInPlace, FillUninitialized, RemoveDropouts))
    values = json.loads(exported_to_json(program))
    module = values["graph_module"]
    graph, inputs = module["graph"], module["signature"]["input_specs"]
    tensor_inputs = [next(iter(entry.values()))["name"] for entry in graph["inputs"] if "as_tensor" in entry]
    for node in graph["nodes"]:
        # The rest only helps to debug the export; it would be most of the file, and holds local paths.
        node["metadata"] = {key: text for key, text in node["metadata"].items() if key == "nn_module_stack"}
    reduced = {
        "schema_version": values["schema_version"],
        # torch.export notes multiples of the batch as symbols of their own, such as "2*s27", that nothing refers to.
        "range_constraints": {name: at for name, at in values["range_constraints"].items() if name.isalnum()},
        "graph_module": {
            "signature": {"input_specs": inputs},
            "module_call_graph": module["module_call_graph"][:1],
            "graph": {
                "nodes": graph["nodes"],
                "outputs": graph["outputs"],
                "tensor_values": {name: graph["tensor_values"][name] for name in tensor_inputs},
            },
        },
    }
    try:
        # What could not be loaded is refused now, while the program is still there.
        exported_program(reduced, {**program.state_dict, **program.constants})
    except ArtefactError as error:
        msg = f"this program cannot be saved as an artefact: {str(error).partition(';')[0]}; lower it without saving it"
        raise ArtefactError(msg) from error
    return json.dumps(reduced).encode()


def graph_from_bytes(data: bytes, expanded: int, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Rebuild the graph from what :func:`graph_to_json` wrote, compressed, and its tensors.

    Args:
        data: The file.
        expanded: How long the JSON is.
        tensors: The parameters, buffers and constants, by name.

    Raises:
        ArtefactError: The graph is not readable, or holds what no quantized denoiser does.
    """
    program = exported_program(
        parse_json(_expand(data, expanded), "the graph of the artefact", MOST_GRAPH_BYTES), tensors
    )
    constants = {
        getattr(spec.value, TENSOR_KINDS[str(spec.type)])
        for spec in program.graph_module.signature.input_specs
        if spec.type == "tensor_constant" or (spec.type == "buffer" and not spec.buffer.persistent)
    }
    state = {name: tensor for name, tensor in tensors.items() if name not in constants}
    try:
        exported = exported_from_schema(program, state, {name: tensors[name] for name in constants})
        graph_module = exported.module(check_guards=False)
        assert isinstance(graph_module, fx.GraphModule)
        run_pipeline(graph_module, (RemoveGuards, StripDeadState))
        _compute_values(graph_module)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        msg = f"the graph of the artefact does not fit this torch ({type(error).__name__}: {text}); save it again"
        raise ArtefactError(msg) from error
    return graph_module


def _expand(data: bytes, expanded: int) -> bytes:
    """Decompress to exactly this length, and never to more."""
    try:
        stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        text = stream.decompress(data, expanded + 1)
    except zlib.error as error:
        msg = f"the graph of the artefact cannot be read ({error}); save the program again"
        raise ArtefactError(msg) from error
    if len(text) != expanded or not stream.eof or stream.unused_data:
        msg = "the graph of the artefact is not as long as the manifest says; copy or save it again"
        raise ArtefactError(msg)
    return text


def _compute_values(graph_module: fx.GraphModule) -> None:
    """Compute the value of every node from those of the inputs: kernels are chosen by them, so no file may say them."""
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            node.meta.pop("val", None)
    PropagateValues()(graph_module)
    output: Any = graph_module.graph.output_node()
    output.meta["val"] = fx.node.map_arg(output.args[0], lambda node: node.meta["val"])
