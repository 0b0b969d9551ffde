"""Store integer weights in float again, for layers that no integer kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.quantized.fold_weight_zero_points import dequantizes_constant
from tfmq_fx.passes.support.nodes import add_buffer, insert_get_attr, read_attribute, replace_node
from tfmq_fx.passes.support.predicates import is_weighted

__all__ = ["DequantizeWeights"]


class DequantizeWeights(GraphPass):
    """Replace the dequantized integer weight of chosen layers by its float value.

    Before::

        %w = dequantize_per_channel(%q, %scale, %zero, 0, -128, 127, int8)      %y = conv2d(%x, %w, %b)

    After::

        %w = get_attr[float_weight]      %y = conv2d(%x, %w, %b)

    Legality: the value is a constant, computed here by the same operator; numerics are preserved to the bit. A weight
    that several layers read is stored in float for the chosen ones alone.
    Why: a compiler that matches ``dequantize -> conv`` takes the layer for an integer kernel, whether or not the kernel
    is right for it.
    Meta: the new node takes the module stack of the dequantize.

    Args:
        select: Which weighted nodes get a float weight.
    """

    id: ClassVar[str] = "tfmq::dequantize_weights"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(self, select: Callable[[fx.Node], bool]) -> None:
        super().__init__()
        self.select = select

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Compute each weight once and hand it to the layers that were chosen."""
        chosen: dict[fx.Node, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            weight = node.args[1] if is_weighted(node) and len(node.args) > 1 else None
            if isinstance(weight, fx.Node) and dequantizes_constant(weight) and self.select(node):
                chosen.setdefault(weight, []).append(node)
        for weight, layers in chosen.items():
            self._store(graph_module, weight, layers)
        return bool(chosen)

    def _store(self, graph_module: fx.GraphModule, weight: fx.Node, layers: list[fx.Node]) -> None:
        operator: Any = weight.target
        tables = [read_attribute(graph_module, str(source.target)) for source in weight.all_input_nodes]
        with torch.no_grad():
            value = operator(*tables, *weight.args[len(tables) :], **weight.kwargs)
        with graph_module.graph.inserting_before(weight):
            stored = insert_get_attr(graph_module, add_buffer(graph_module, "float_weight", value), anchor=weight)
        if len(layers) == len(weight.users):
            replace_node(weight, stored)
            return
        for layer in layers:
            layer.replace_input_with(weight, stored)
