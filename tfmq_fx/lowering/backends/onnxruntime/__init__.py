"""The ONNX Runtime backend: the program as an ONNX model, for one batch size at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from tfmq_fx.lowering.backends.onnxruntime.session import OnnxSession
from tfmq_fx.lowering.backends.onnxruntime.translator import OnnxTranslator
from tfmq_fx.lowering.run.by_batch import ByBatch

__all__ = ["compile_graph"]


def compile_graph(graph_module: fx.GraphModule, batch: int, precision: str) -> tuple[Callable[..., Any], set[str]]:
    """Compile for one batch size; others follow when they come.

    Args:
        graph_module: The q/dq graph; it is kept.
        batch: The batch size to compile for at once.
        precision: ``"f32"``, the only one.

    Returns:
        The callable, and the names of the nodes that run on integer kernels.
    """
    run = ByBatch(graph_module, lambda size: OnnxSession(OnnxTranslator(graph_module, size).model()))
    session = run.session(batch)
    assert isinstance(session, OnnxSession)
    return run, session.integer_layers()
