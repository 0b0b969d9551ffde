"""State that a model changes during a call."""

from __future__ import annotations

from torch import fx

from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.errors import CaptureError
from tfmq_fx.passes.canonical.replace_in_place import DETACH
from tfmq_fx.passes.support.memory import memory_of
from tfmq_fx.passes.support.predicates import is_call

__all__ = ["check_state"]


def check_state(graph_module: fx.GraphModule) -> None:
    """Raise where an operator writes into a buffer: calibration would write into it too, and every call after it.

    Raises:
        CaptureError: Names the buffer.
    """
    stored = {
        memory: str(node.target)
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
        for memory in memory_of(node)
    }
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or is_call(node, DETACH):
            continue
        for argument, value in zip(schema_of(node.target).arguments, node.args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if not writes or not isinstance(value, fx.Node):
                continue
            for memory in memory_of(value) & stored.keys():
                msg = (
                    f"the model changes its buffer {stored[memory]!r} during a call ({node.target}), and a quantized "
                    "program keeps no state: pass it as an input, or compute a new value instead"
                )
                raise CaptureError(msg)
