"""Collect ONNX nodes, and know the shape and dtype of each value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

__all__ = ["GraphBuilder", "Value", "element_type"]

OPSET = 21
IR_VERSION = 10

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


def element_type(dtype: torch.dtype) -> int:
    """ONNX's element type of a dtype."""
    return int(TYPES[dtype])


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the graph: what it is called, its shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class GraphBuilder:
    """The nodes, constants and inputs of a graph that is being built."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []

    def add_input(self, name: str, shape: list[int], dtype: torch.dtype) -> Value:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type(dtype), shape))
        return Value(name, tuple(shape), dtype)

    def constant(self, value: Tensor) -> Value:
        """Store a constant."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return Value(name, tuple(value.shape), value.dtype)

    def sizes(self, values: list[int]) -> Value:
        """Store a list of sizes or axes."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def emit(self, operator: str, inputs: list[Value | None], shape: Any, dtype: torch.dtype, *,
             name: str = "", **attributes: Any) -> Value:  # fmt: skip
        """Add a node with one output."""
        return self.emit_several(operator, inputs, [tuple(shape)], dtype, name=name, **attributes)[0]

    def emit_several(self, operator: str, inputs: list[Value | None], shapes: list[tuple[int, ...]],
                     dtype: torch.dtype, *, name: str = "", **attributes: Any) -> list[Value]:  # fmt: skip
        """Add a node with an output of each shape."""
        title = f"{operator}_{len(self._nodes)}"
        outputs = [Value(f"{title}_{place}", shape, dtype) for place, shape in enumerate(shapes)]
        names = [value.name if value is not None else "" for value in inputs]
        node = helper.make_node(operator, names, [value.name for value in outputs], name=name or title, **attributes)
        self._nodes.append(node)
        return outputs

    def model(self, results: list[Value]) -> onnx.ModelProto:
        """The finished model."""
        outputs = [helper.make_tensor_value_info(r.name, element_type(r.dtype), list(r.shape)) for r in results]
        graph = helper.make_graph(self._nodes, "tfmq_fx", self._inputs, outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        return model
