"""The one place for imports that torch and torchao do not promise to keep."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.exc
import torch.fx.experimental._config
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.serde.schema import ExportedProgram as ExportedProgramSchema
from torch._export.serde.serialize import (
    EnumEncoder,
    ExportedProgramDeserializer,
    ExportedProgramSerializer,
    _dataclass_to_dict,
    _dict_to_dataclass,
)
from torch._inductor.package.package import package_aoti
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

__all__ = [
    "HAS_INTEGER_CONVS",
    "Q_ANNOTATION_KEY",
    "CompilerError",
    "FakeTensor",
    "FakeTensorMode",
    "calling_convention",
    "constant_floats",
    "enable_python_dispatcher",
    "exported_from_dict",
    "exported_to_json",
    "has_calling_convention",
    "is_prepared",
    "load_pt2",
    "no_special_batch_sizes",
    "output_structure",
    "package_aoti",
    "plain_calling_convention",
]


#: What every failure of ``torch.compile`` and of AOTInductor is.
CompilerError = torch._dynamo.exc.TorchDynamoException


def calling_convention(graph: fx.Graph) -> tuple[list[str], Any]:
    """Argument names and the input structure ``((args), {kwargs})`` of an exported graph."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    return list(info.orig_args), info.in_spec


def has_calling_convention(graph: fx.Graph) -> bool:
    """Whether ``graph`` says how its inputs and results are structured, as exported graphs do."""
    return getattr(graph._codegen, "pytree_info", None) is not None


def plain_calling_convention(graph: fx.Graph) -> None:
    """Write down the convention of a graph without one: its placeholders by position, its results as they stand."""
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    _, inputs = pytree.tree_flatten((tuple(names), {}))
    output = graph.output_node()
    leaves, results = pytree.tree_flatten(output.args[0])
    output.args = (tuple(leaves),)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, inputs, results)))


def is_prepared(graph_module: fx.GraphModule) -> bool:
    """Whether torchao still knows that it prepared the graph; ``convert_pt2e`` asserts it."""
    return "_observed_graph_module_attrs" in graph_module.meta


def output_structure(graph: fx.Graph) -> Any:
    """The structure that an exported graph gives its results."""
    return graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]


@contextlib.contextmanager
def constant_floats() -> Iterator[None]:
    """Compile Python floats into the code: otherwise module constants become tensors that loops read."""
    with torch._dynamo.config.patch(specialize_float=True):
        yield


@contextlib.contextmanager
def no_special_batch_sizes() -> Iterator[None]:
    """Compile symbolic sizes without the special case for 0 and 1."""
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


def exported_to_json(program: ExportedProgram) -> str:
    """The graph of an exported program in torch.export's JSON schema, without its tensors."""
    serialized = ExportedProgramSerializer().serialize(program)
    plain = _dataclass_to_dict(serialized.exported_program)  # type: ignore[no-untyped-call]
    return json.dumps(plain, cls=EnumEncoder)


def exported_from_dict(values: dict[str, Any], tensors: dict[str, Tensor]) -> ExportedProgram:
    """Rebuild an exported program from its JSON values and its tensors; nothing is unpickled."""
    schema = _dict_to_dataclass(ExportedProgramSchema, values)  # type: ignore[no-untyped-call]
    program: ExportedProgram = ExportedProgramDeserializer().deserialize(schema, tensors, {}, None)
    return program


#: Whether this build of torch has oneDNN's integer convolution.
HAS_INTEGER_CONVS: bool = hasattr(torch.ops.onednn, "qconv_prepack")


def _prepacked(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(weight)


if HAS_INTEGER_CONVS:
    # torch 2.13 prepacks weights behind its own tracing only, so it does not know the shape of the result.
    torch.library.register_fake("onednn::qconv_prepack", _prepacked)
