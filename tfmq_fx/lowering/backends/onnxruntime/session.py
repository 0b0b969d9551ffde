"""Run an ONNX model in ONNX Runtime on torch tensors, and read what its optimizer made of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from tfmq_fx._torch.processor import sums_bytes_exactly

__all__ = ["OnnxSession"]

#: Operators that multiply integers, as ONNX Runtime's optimizer leaves them.
INTEGER_OPERATORS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")

#: Has its optimizer turn signed weights into unsigned ones, whose kernels add exactly on processors without VNNI.
EXACT_SUMS = ("session.x64quantprecision", "1")


class OnnxSession:
    """A model in ONNX Runtime.

    Args:
        model: The model.

    Attributes:
        optimized: The graph that runs: operators as the optimizer left them, without the weights.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if not sums_bytes_exactly():
            options.add_session_config_entry(*EXACT_SUMS)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            self.optimized = onnx.load(str(path), load_external_data=False).graph
        self._inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model."""
        arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
        results = self._session.run(None, dict(zip(self._inputs, arrays, strict=True)))
        return [torch.from_numpy(result) for result in results]

    def integer_layers(self) -> set[str]:
        """Names of the layers whose operator multiplies integers, as the translator named them."""
        return {node.name for node in self.optimized.node if node.op_type in INTEGER_OPERATORS}
