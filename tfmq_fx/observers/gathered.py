"""Conversion of an observer whose parameters are gathered from a table, one entry per index of the first axis."""

from __future__ import annotations

import torch
from torch import fx
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, replace_node

__all__ = ["convert_gathered"]

aten = torch.ops.aten


def convert_gathered(observer: ObserverBase, model: fx.GraphModule, node: fx.Node) -> None:
    """Replace an observer's call ``observer(x, rows)`` by quantize and dequantize with gathered parameters.

    After::

        %s = index_select[%scales](0, %rows)      %z = index_select[%zero_points](0, %rows)
        %q = quantize_per_channel(%x, %s, %z, 0, …)      %y = dequantize_per_channel(%q, %s, %z, 0, …)

    The "channel" is the batch axis, so every item of a batch may have its own timestep.

    Args:
        observer: Gives the tables (``calculate_qparams``: float32 and int64, ``[rows]`` each), ``quant_min``,
            ``quant_max`` and ``dtype``.
        model: The graph, changed in place.
        node: The call.
    """
    x, rows = node.args
    scale, zero = observer.calculate_qparams()
    name, graph = str(node.target), model.graph
    with graph.inserting_before(node):
        picked = []
        for suffix, table in (("scale", scale), ("zero_point", zero)):
            read = insert_get_attr(model, add_buffer(model, f"{name}_{suffix}", table), anchor=node)
            picked.append(insert_call(graph, aten.index_select.default, (read, 0, rows), anchor=node))
        tail = (*picked, 0, observer.quant_min, observer.quant_max, observer.dtype)
        quantized = insert_call(graph, decomposed.quantize_per_channel.default, (x, *tail), anchor=node)
        restored = insert_call(graph, decomposed.dequantize_per_channel.default, (quantized, *tail), anchor=node)
    replace_node(node, restored)
