"""From an ATen graph to an OpenVINO model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import openvino as ov
import torch
from openvino import opset15 as opset
from torch import Tensor

from tfmq_fx.lowering.backends.openvino import elementwise, layers, quantization, shapes
from tfmq_fx.lowering.backends.openvino.elementwise import element_type
from tfmq_fx.lowering.translation.translator import Operator, Translator

__all__ = ["OpenVINOTranslator"]


class OpenVINOTranslator(Translator):
    """Builds an ``openvino.Model``; layers that multiply are named after their nodes."""

    engine = "OpenVINO"
    operators: ClassVar[Mapping[Any, Operator]] = {
        **elementwise.OPERATORS,
        **layers.OPERATORS,
        **quantization.OPERATORS,
        **shapes.OPERATORS,
    }

    def add_input(self, name: str, shape: list[int], dtype: torch.dtype) -> Any:
        """A parameter of the model."""
        parameter = opset.parameter(shape, element_type(dtype), name=name)
        self.parameters.append(parameter)
        return parameter.output(0)

    def constant(self, value: Tensor) -> Any:
        """A constant that shares no memory with the tensor."""
        return opset.constant(value.contiguous().numpy(), dtype=element_type(value.dtype)).output(0)

    def model(self) -> ov.Model:
        """Translate the graph and wrap it into a model."""
        self.parameters: list[Any] = []
        self.run()
        return ov.Model(self.results, self.parameters, "tfmq_fx")
