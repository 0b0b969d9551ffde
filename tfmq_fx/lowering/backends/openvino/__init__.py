"""The OpenVINO backend: the program as an OpenVINO model, compiled for one batch size at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx

from tfmq_fx.lowering.backends.openvino.kernels import integer_layers
from tfmq_fx.lowering.backends.openvino.session import OpenVINOSession
from tfmq_fx.lowering.backends.openvino.translator import OpenVINOTranslator
from tfmq_fx.lowering.run.by_batch import ByBatch
from tfmq_fx.passes import HoistQuantizers

__all__ = ["compile_graph"]


def compile_graph(graph_module: fx.GraphModule, batch: int, precision: str) -> tuple[Callable[..., Any], set[str]]:
    """Compile for one batch size; others follow when they come.

    Args:
        graph_module: The q/dq graph; its weights are kept.
        batch: The batch size to compile for at once.
        precision: ``"f32"`` or ``"bf16"``.

    Returns:
        The callable, and the names of the nodes that run on integer kernels.
    """
    prepared = _prepared(graph_module)
    run = ByBatch(prepared, lambda size: OpenVINOSession(OpenVINOTranslator(prepared, size).model(), precision))
    session = run.session(batch)
    assert isinstance(session, OpenVINOSession)
    return run, integer_layers(session.compiled)


def _prepared(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in the form that the engine compiles best; it shares its weights."""
    shared = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    copied: fx.GraphModule = copy.deepcopy(graph_module, shared)
    HoistQuantizers()(copied)
    return copied
