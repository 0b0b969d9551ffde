"""Fold the zero points of integer weights into the integers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import add_buffer, insert_call, insert_get_attr, read_attribute, replace_node

__all__ = ["FoldWeightZeroPoints", "fold_zero_points"]

#: By name: the operator exists only once torchao (or ``torch.ao``) has registered its library.
DEQUANTIZE = "quantized_decomposed::dequantize_per_channel"


def fold_zero_points(quantized: Tensor, zero_points: Tensor, axis: int) -> Tensor | None:
    """Return ``quantized - zero_points`` as int8, or None when it does not fit.

    Args:
        quantized: Integers of any shape.
        zero_points: One per channel, shape ``[quantized.shape[axis]]``.
        axis: The channel axis.

    A ``b``-bit asymmetric weight has ``q`` and ``z`` in ``[0, 2^b - 1]``, so up to 7 bits always fit.
    """
    shape = [-1 if i == axis else 1 for i in range(quantized.ndim)]
    shifted = quantized.to(torch.int64) - zero_points.to(torch.int64).reshape(shape)
    if int(shifted.min()) < -128 or int(shifted.max()) > 127:
        return None
    return shifted.to(torch.int8)


def dequantizes_constant(node: Any) -> bool:
    """Whether ``node`` dequantizes a constant tensor per channel."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    constant = all(isinstance(a, fx.Node) and a.op == "get_attr" for a in node.args[:3])
    return constant and schema_of(node.target).name == DEQUANTIZE


class FoldWeightZeroPoints(GraphPass):
    """Make every per-channel integer weight int8 with zero point 0.

    Before::

        %w = dequantize_per_channel(%q, %scale, %zero, 0, 0, 15, uint8)

    After::

        %w = dequantize_per_channel(%q_minus_zero, %scale, %zeros, 0, -128, 127, int8)

    Legality: ``s * (q - z) = s * ((q - z) - 0)``; exact in integers. Weights for which ``q - z`` leaves
    int8 (8-bit asymmetric) stay as they are. Why: the oneDNN kernels accept a weight zero point and
    ignore it, silently. Numerics are preserved to the bit.
    Meta: the new nodes take the module stack of the dequantize.
    """

    id: ClassVar[str] = "tfmq::fold_weight_zero_points"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fold every non-zero zero point that fits."""
        graph = graph_module.graph
        done: dict[tuple[Any, ...], tuple[str, str]] = {}
        for node in [n for n in graph.nodes if dequantizes_constant(n)]:
            quantized, scale, zero, axis = node.args[:4]
            integers = read_attribute(graph_module, str(quantized.target))
            zero_points = read_attribute(graph_module, str(zero.target))
            if zero_points.is_floating_point() or not bool(zero_points.any()):
                continue
            key = (quantized.target, zero.target, axis)
            if key not in done:
                folded = fold_zero_points(integers, zero_points, int(axis))
                if folded is None:
                    continue
                base, zeros = str(quantized.target), torch.zeros_like(zero_points)
                done[key] = (
                    add_buffer(graph_module, f"{base}_int8", folded),
                    add_buffer(graph_module, f"{base}_zero", zeros),
                )
            with graph.inserting_before(node):
                weight, none = (insert_get_attr(graph_module, name, anchor=node) for name in done[key])
                args = (weight, scale, none, axis, -128, 127, torch.int8)
                new = insert_call(graph, node.target, args, anchor=node, kwargs=dict(node.kwargs))
            replace_node(node, new)
        return bool(done)
