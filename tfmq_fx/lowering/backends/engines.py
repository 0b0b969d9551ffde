"""Engines of others as backends: what they are called, what they need, and how a graph gets to them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.inductor.native import precisions
from tfmq_fx.lowering.translation.float32_interface import as_float32, with_types_of

__all__ = ["ENGINES", "Engine", "available_engines", "compile_engine", "resolve_precision"]


@dataclass(frozen=True)
class Engine:
    """An optional backend.

    Attributes:
        title: Its name in messages.
        module: The module of ours with a ``compile_graph(graph_module, batch, precision)`` that returns the callable
            and the names of the layers on integer kernels.
        needs: The packages that it imports.
        precisions: What it can compute in between integer kernels; the first is the default.
    """

    title: str
    module: str
    needs: tuple[str, ...]
    precisions: tuple[str, ...]


ENGINES = {
    "openvino": Engine("OpenVINO", "tfmq_fx.lowering.backends.openvino", ("openvino",), ("f32", "bf16")),
    "onnxruntime": Engine("ONNX Runtime", "tfmq_fx.lowering.backends.onnxruntime", ("onnxruntime", "onnx"), ("f32",)),
}


def available_engines() -> list[str]:
    """The engines whose packages are installed."""
    return [name for name, engine in ENGINES.items() if not _missing(engine)]


def resolve_precision(backend: str, precision: str | None) -> str:
    """What passes between the backend's kernels: ``precision``, or its default.

    Raises:
        LoweringError: The backend does not have it; the message names what it has.
    """
    known = ENGINES[backend].precisions if backend in ENGINES else ()
    if backend in ("inductor", "aot"):
        known = precisions()
    if precision is not None and precision not in known:
        choices = f"use one of {', '.join(map(repr, known))}" if known else "it takes none"
        msg = f"precision={precision!r} is not supported by backend={backend!r}: {choices}"
        raise LoweringError(msg)
    return precision or (known[0] if known else "f32")


def _missing(engine: Engine) -> list[str]:
    return [name for name in engine.needs if importlib.util.find_spec(name) is None]


def compile_engine(
    name: str, graph_module: fx.GraphModule, batch: int, precision: str | None
) -> tuple[Callable[..., Any], set[str]]:
    """Compile a graph on the engine called ``name``.

    Args:
        name: A key of :data:`ENGINES`.
        graph_module: The q/dq graph; it is not changed.
        batch: The batch size to compile for at once.
        precision: What is computed in between integer kernels; None takes the engine's default.

    Returns:
        The callable, and the names of the nodes that run on integer kernels.

    Raises:
        LoweringError: A package is missing, or the engine lacks an operator.
    """
    engine = ENGINES[name]
    if missing := _missing(engine):
        msg = f'backend={name!r} needs {" and ".join(missing)}: pip install "tfmq-fx[{name}]"'
        raise LoweringError(msg)
    compile_graph = importlib.import_module(engine.module).compile_graph
    inner = as_float32(graph_module)
    run, integer = compile_graph(inner, batch, precision or engine.precisions[0])
    return (run if inner is graph_module else with_types_of(graph_module, run)), integer
