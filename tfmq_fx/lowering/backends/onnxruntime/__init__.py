"""ONNX Runtime: the program as an ONNX model, for one batch size at a time."""

from tfmq_fx.lowering.backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["BACKEND", "OnnxRuntimeBackend"]

BACKEND = OnnxRuntimeBackend()
