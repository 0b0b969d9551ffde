"""The table of engines."""

from __future__ import annotations

from typing import Any

from latency_engines.engine import Engine

__all__ = ["ENGINES", "GROUPS"]


def _compiled(**settings: Any) -> Engine:
    arithmetic = "bfloat16" if "bfloat16" in settings else "float32"
    return Engine("project", "torch_float", {"compile": True, **settings}, arithmetic)


def _ours(weight_bits: int, backend: str) -> Engine:
    # 4-bit weights rounded to nearest part from random ones by 0.16; learned rounding is not what is timed here.
    settings = {"weight_bits": weight_bits, "backend": backend}
    return Engine("project", "tfmq", settings, "int8", dynamic=True, wrong=0.15 if weight_bits == 8 else 0.3)


def _openvino(model: str, precision: str, arithmetic: str) -> Engine:
    return Engine("openvino", "openvino_model", {"model": model, "precision": precision}, arithmetic)


def _onnxruntime(model: str, arithmetic: str) -> Engine:
    return Engine("onnxruntime", "onnxruntime_model", {"model": model}, arithmetic)


ENGINES: dict[str, Engine] = {
    "eager fp32": Engine("project", "torch_float", {"compile": False}, dynamic=True),
    "compile fp32": _compiled(),
    "compile bf16 autocast": _compiled(bfloat16="autocast"),
    "compile bf16 cast": _compiled(bfloat16="cast"),
    "compile bf16 cast, channels-last": _compiled(bfloat16="cast", channels_last=True),
    "torchao int8": Engine("project", "stock_torchao", {"bfloat16": False}, "int8"),
    "torchao int8, bf16 autocast": Engine("project", "stock_torchao", {"bfloat16": True}, "int8"),
    "ours W8A8 inductor": _ours(8, "inductor"),
    "ours W4A8 inductor": _ours(4, "inductor"),
    "ours W8A8 aot": _ours(8, "aot"),
    "ours W8A8 openvino": _ours(8, "openvino"),
    "ours W8A8 onnxruntime": _ours(8, "onnxruntime"),
    "OpenVINO fp32": _openvino("float", "f32", "float32"),
    "OpenVINO bf16": _openvino("float", "bf16", "bfloat16"),
    "NNCF + OpenVINO int8, f32": _openvino("transformer", "f32", "int8"),
    "NNCF + OpenVINO int8, bf16": _openvino("transformer", "bf16", "int8"),
    "NNCF + OpenVINO int8, default, f32": _openvino("default", "f32", "int8"),
    "NNCF + OpenVINO int8, default, bf16": _openvino("default", "bf16", "int8"),
    "ONNX Runtime fp32": _onnxruntime("float", "float32"),
    "ONNX Runtime int8, s8 activations": _onnxruntime("qdq-s8", "int8"),
    "ONNX Runtime int8, u8 activations": _onnxruntime("qdq-u8", "int8"),
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
