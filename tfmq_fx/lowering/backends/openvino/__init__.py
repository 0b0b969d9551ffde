"""OpenVINO: the program as an OpenVINO model, compiled for one batch size at a time."""

from tfmq_fx.lowering.backends.openvino.backend import OpenVINOBackend

__all__ = ["BACKEND", "OpenVINOBackend"]

BACKEND = OpenVINOBackend()
