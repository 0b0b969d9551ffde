"""The table of engines."""

from __future__ import annotations

from latency_engines.engine import Engine

__all__ = ["ENGINES", "GROUPS"]

ENGINES: dict[str, Engine] = {
    "eager fp32": Engine("project", "torch_float", {"compile": False}),
    "compile fp32": Engine("project", "torch_float", {"compile": True}),
    "compile bf16 autocast": Engine(
        "project", "torch_float", {"compile": True, "bfloat16": "autocast"}, arithmetic="bfloat16"
    ),
    "compile bf16 cast": Engine("project", "torch_float", {"compile": True, "bfloat16": "cast"}, arithmetic="bfloat16"),
    "compile bf16 cast, channels-last": Engine(
        "project",
        "torch_float",
        {"compile": True, "bfloat16": "cast", "channels_last": True},
        arithmetic="bfloat16",
    ),
    "torchao int8": Engine("project", "stock_torchao", arithmetic="int8"),
    "torchao int8, bf16 autocast": Engine("project", "stock_torchao", {"bfloat16": True}, arithmetic="int8"),
    "ours W8A8 inductor": Engine("project", "tfmq", {"weight_bits": 8, "backend": "inductor"}, arithmetic="int8"),
    "ours W4A8 inductor": Engine("project", "tfmq", {"weight_bits": 4, "backend": "inductor"}, arithmetic="int8"),
    "ours W8A8 aot": Engine("project", "tfmq", {"weight_bits": 8, "backend": "aot"}, arithmetic="int8"),
    "ours W8A8 openvino": Engine("ours", "tfmq", {"weight_bits": 8, "backend": "openvino"}, arithmetic="int8"),
    "ours W8A8 onnxruntime": Engine("ours", "tfmq", {"weight_bits": 8, "backend": "onnxruntime"}, arithmetic="int8"),
    "OpenVINO fp32": Engine("openvino", "openvino_model", {"model": "float", "precision": "f32"}),
    "OpenVINO bf16": Engine(
        "openvino", "openvino_model", {"model": "float", "precision": "bf16"}, arithmetic="bfloat16"
    ),
    "NNCF + OpenVINO int8, f32": Engine(
        "openvino", "openvino_model", {"model": "transformer", "precision": "f32"}, arithmetic="int8"
    ),
    "NNCF + OpenVINO int8, bf16": Engine(
        "openvino", "openvino_model", {"model": "transformer", "precision": "bf16"}, arithmetic="int8"
    ),
    "NNCF + OpenVINO int8, default, f32": Engine(
        "openvino", "openvino_model", {"model": "default", "precision": "f32"}, arithmetic="int8"
    ),
    "NNCF + OpenVINO int8, default, bf16": Engine(
        "openvino", "openvino_model", {"model": "default", "precision": "bf16"}, arithmetic="int8"
    ),
    "ONNX Runtime fp32": Engine("onnxruntime", "onnxruntime_model", {"model": "float"}),
    "ONNX Runtime int8": Engine("onnxruntime", "onnxruntime_model", {"model": "qdq-s8"}, arithmetic="int8"),
    "ONNX Runtime int8, u8 activations": Engine(
        "onnxruntime", "onnxruntime_model", {"model": "qdq-u8"}, arithmetic="int8"
    ),
}

#: Engines of which the best one counts, by the name that a summary gives it.
GROUPS: dict[str, tuple[str, ...]] = {
    "best bf16": tuple(name for name, engine in ENGINES.items() if engine.arithmetic == "bfloat16"),
    "best NNCF + OpenVINO int8": tuple(name for name in ENGINES if name.startswith("NNCF")),
    "best ONNX Runtime int8": tuple(name for name in ENGINES if name.startswith("ONNX Runtime int8")),
    "best peer int8": tuple(
        name
        for name, engine in ENGINES.items()
        if engine.arithmetic == "int8" and engine.environment in ("openvino", "onnxruntime")
    ),
    "best of ours W8A8": tuple(name for name in ENGINES if name.startswith("ours W8A8")),
}
