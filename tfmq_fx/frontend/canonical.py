"""Bring an exported graph into the one form that everything behind works on, or say why it cannot be."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from tfmq_fx._torch.operators import HigherOrderOperator
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.weights import check_weights
from tfmq_fx.passes import CANONICALIZE, ComputeInFloat32, PassError
from tfmq_fx.passes.analysis.multiply_adds import multiply_adds
from tfmq_fx.passes.canonical.inline_regions import changes_numerics
from tfmq_fx.passes.support.nodes import read_attribute

__all__ = ["canonicalize"]


def canonicalize(graph_module: fx.GraphModule) -> None:
    """Canonicalize a graph in place; layers that compute in bfloat16, float16 or float64 compute in float32 behind it.

    Raises:
        CaptureError: A region computes in another dtype than it says, layers stand where no pass can reach them, or
            the graph cannot be computed in float32.
    """
    CANONICALIZE.run(graph_module)
    _refuse_hidden_layers(graph_module)
    try:
        widened = ComputeInFloat32()(graph_module).modified
    except PassError as error:
        raise CaptureError(str(error)) from error
    if widened:
        check_weights(graph_module)
        CANONICALIZE.run(graph_module)


def _refuse_hidden_layers(graph_module: fx.GraphModule) -> None:
    """Raise where layers stand in a region that is not part of the graph."""
    for node in graph_module.graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        if changes_numerics(node):
            msg = (
                f"the model switches autocast to {str(node.args[1]).removeprefix('torch.')} on inside itself (node "
                f"{node.name!r}), which computes other numbers than its layers say; switch it off for quantization"
            )
            raise CaptureError(msg)
        if any(_holds_layers(body) for body in _bodies(graph_module, node)):
            msg = (
                f"the model has layers inside torch.{node.target} (node {node.name!r}), where they cannot be "
                "quantized; write that part without it, or capture the branch that is used"
            )
            raise CaptureError(msg)


def _bodies(graph_module: nn.Module, node: fx.Node) -> list[fx.GraphModule]:
    attributes = (n for n in node.all_input_nodes if n.op == "get_attr")
    values: list[Any] = [read_attribute(graph_module, str(attribute.target)) for attribute in attributes]
    return [body for body in values if isinstance(body, fx.GraphModule)]


def _holds_layers(body: fx.GraphModule) -> bool:
    return bool(multiply_adds(body)) or any(map(_holds_layers, (b for n in body.graph.nodes for b in _bodies(body, n))))
