"""From an ATen graph to an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import onnx

from tfmq_fx.lowering.backends.onnxruntime import elementwise, layers, quantization, shapes
from tfmq_fx.lowering.backends.onnxruntime.context import OnnxContext
from tfmq_fx.lowering.translation.translator import Operator

__all__ = ["OnnxTranslator"]


class OnnxTranslator(OnnxContext):
    """Builds an ONNX model; layers that multiply are named after their nodes."""

    operators: ClassVar[Mapping[Any, Operator]] = {
        **elementwise.OPERATORS,
        **layers.OPERATORS,
        **quantization.OPERATORS,
        **shapes.OPERATORS,
    }

    def model(self) -> onnx.ModelProto:
        """Translate the graph and wrap it into a model."""
        self.run()
        return self.builder.model(self.results)
