"""Compile an OpenVINO model for the CPU and call it with torch tensors."""

from __future__ import annotations

import threading

import openvino as ov
import torch
from torch import Tensor

__all__ = ["OpenVINOSession"]


class OpenVINOSession:
    """A compiled model; inputs are read where they are, results are copied out of the engine's memory.

    Args:
        model: The model; it is not needed afterwards.
        precision: ``"f32"`` or ``"bf16"``: what is computed between the integer kernels.

    Attributes:
        compiled: The compiled model.
    """

    def __init__(self, model: ov.Model, precision: str) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.compiled = ov.Core().compile_model(model, "CPU", settings)
        self._request = self.compiled.create_infer_request()
        self._free = threading.Lock()
        self._results = range(len(self.compiled.outputs))

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model."""
        shared = [ov.Tensor(tensor.detach().contiguous().numpy(), shared_memory=True) for tensor in tensors]
        # One request has one set of results, and infer lets other threads run.
        with self._free:
            self._request.infer(dict(enumerate(shared)))
            return [torch.from_numpy(self._request.get_output_tensor(index).data.copy()) for index in self._results]
