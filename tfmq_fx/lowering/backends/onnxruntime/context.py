"""What the translations of ATen operators to ONNX write with: values of the model under construction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.lowering.backends.onnxruntime.graph import GraphBuilder, Value, element_type
from tfmq_fx.lowering.backends.onnxruntime.integers import INTEGERS, IntegerActivation, IntegerWeight
from tfmq_fx.lowering.translation.translator import Translator

__all__ = ["OnnxContext"]


class OnnxContext(Translator):
    """Adds nodes and constants to an ONNX model.

    Attributes:
        builder: The model under construction.
    """

    engine = "ONNX Runtime"

    def __init__(self, graph_module: fx.GraphModule, batch: int) -> None:
        super().__init__(graph_module, batch)
        self.builder = GraphBuilder()
        self._real: dict[int, Value] = {}

    def add_input(self, name: str, shape: list[int], dtype: torch.dtype) -> Value:
        """An input of the model."""
        return self.builder.add_input(name, shape, dtype)

    def constant(self, value: Tensor) -> Value:
        """A constant of the model."""
        return self.builder.constant(value)

    def number(self, value: float) -> Value:
        """A float32 constant."""
        return self.builder.constant(torch.tensor(value, dtype=torch.float32))

    def value(self, x: Any, dtype: torch.dtype | None = None) -> Any:
        """The value of an argument in float, dequantized where it is in integers."""
        if isinstance(x, IntegerWeight):
            return self.constant(x.real)
        if not isinstance(x, IntegerActivation):
            return super().value(x, dtype)
        if id(x) not in self._real:
            operator = "DequantizeLinear" if x.integers.dtype in INTEGERS else "Mul"
            inputs: list[Value | None] = [x.integers, self.number(x.scale)]
            inputs += [x.zero_point] if operator == "DequantizeLinear" else []
            self._real[id(x)] = self.emit(operator, inputs, x.integers.shape, torch.float32)
        return self._real[id(x)]

    def cast(self, x: Any, dtype: torch.dtype | None = None) -> Value:
        """``x`` in ``dtype``, by default that of the result."""
        target = dtype or self.dtype
        value: Value = self.value(x, target)
        if value.dtype == target:
            return value
        return self.emit("Cast", [value], value.shape, target, to=element_type(target))

    def emit(self, operator: str, inputs: list[Any], shape: Any, dtype: torch.dtype, **attributes: Any) -> Value:
        """Add a node."""
        return self.builder.emit(operator, inputs, shape, dtype, **attributes)

    def result(self, operator: str, inputs: list[Any], **attributes: Any) -> Value:
        """Add a node that computes the result of the current node."""
        return self.emit(operator, inputs, self.shape, self.dtype, **attributes)
