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
from torch._dynamo.eval_frame import OptimizedModule
from torch._export.serde import schema
from torch._export.serde.serialize import (
    _SERIALIZE_TO_TORCH_DTYPE,
    EnumEncoder,
    ExportedProgramDeserializer,
    ExportedProgramSerializer,
    _dataclass_to_dict,
)
from torch._inductor.package.package import package_aoti
from torch._ops import HigherOrderOperator
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
    "HigherOrderOperator",
    "OptimizedModule",
    "calling_convention",
    "constant_floats",
    "enable_python_dispatcher",
    "export_schema",
    "exported_from_schema",
    "exported_to_json",
    "has_calling_convention",
    "has_memory",
    "is_prepared",
    "load_pt2",
    "no_special_batch_sizes",
    "output_structure",
    "package_aoti",
    "plain_calling_convention",
    "serialized_dtypes",
    "serialized_node_types",
]


#: The objects of torch.export's JSON schema.
export_schema: Any = schema

#: What every failure of ``torch.compile`` and of AOTInductor is.
CompilerError = torch._dynamo.exc.TorchDynamoException


def calling_convention(graph: fx.Graph) -> tuple[list[str], Any]:
    """Argument names and the input structure ``((args), {kwargs})`` of a graph.

    One that torch.export did not make, or whose structure another tool dropped, is called with its inputs by position.
    """
    info = getattr(graph._codegen, "pytree_info", None)
    if info is not None:
        return list(info.orig_args), info.in_spec
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    return names, pytree.tree_structure((tuple(names), {}))


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
    """The structure that a graph gives its results; a graph without one of its own returns them as they stand."""
    info = getattr(graph._codegen, "pytree_info", None)
    return pytree.tree_structure(graph.output_node().args[0]) if info is None else info.out_spec


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values lie where its pointer says; not where it only stands for another tensor."""
    if torch._is_functional_tensor(tensor):  # it has a pointer, to nothing
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


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


def exported_from_schema(program: Any, tensors: dict[str, Tensor], constants: dict[str, Tensor]) -> ExportedProgram:
    """Rebuild an exported program from objects of :data:`export_schema` and its tensors; nothing is unpickled."""
    rebuilt: ExportedProgram = ExportedProgramDeserializer().deserialize(program, tensors, constants, None)  # type: ignore[arg-type]
    return rebuilt


def serialized_dtypes() -> dict[int, torch.dtype]:
    """The dtypes by their number in torch.export's JSON schema."""
    return dict(_SERIALIZE_TO_TORCH_DTYPE)


def serialized_node_types() -> dict[str, type[Any]]:
    """The pytree nodes of this process, by the name they are serialized under, whose context is plain JSON."""
    return {
        name: kind
        for name, kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items()
        if pytree.SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context is None
    }


#: Whether this build of torch has oneDNN's integer convolution.
HAS_INTEGER_CONVS: bool = hasattr(torch.ops.onednn, "qconv_prepack")


def _prepacked(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(weight)


if HAS_INTEGER_CONVS:
    # torch 2.13 prepacks weights behind its own tracing only, so it does not know the shape of the result.
    torch.library.register_fake("onednn::qconv_prepack", _prepacked)
