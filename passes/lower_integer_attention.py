"""Run quantized attention on our own integer kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.kernels import OPERATORS

from .base import GraphPass
from .channels_last import is_byte_quantizer
from .nodes import insert_call, replace_node
from .predicates import is_call, node_value

__all__ = ["LowerIntegerAttention"]

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
#: The kernel walks the depth by this many bytes; which of the four quantizers is that of the softmax.
DEPTH, SOFTMAX = 4, 2


@dataclass(frozen=True)
class QuantizedAttention:
    """Attention on bytes: its inputs in float, and the quantizers of query, key, softmax and value."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    factor: float
    quantizers: tuple[fx.Node, fx.Node, fx.Node, fx.Node]


def _quantizer(node: Any) -> fx.Node | None:
    """The byte quantizer that ``node`` dequantizes."""
    if not is_call(node, decomposed.dequantize_per_tensor.default):
        return None
    source: Any = node.args[0]
    return source if is_byte_quantizer(source) else None


def _turned(node: Any) -> fx.Node | None:
    """What ``node`` transposes in its last two axes."""
    if not is_call(node, aten.transpose.int) or {axis % node_value(node).ndim for axis in node.args[1:3]} != {2, 3}:
        return None
    source: Any = node.args[0]
    return source if isinstance(source, fx.Node) else None


def find_quantized_attention(node: fx.Node) -> QuantizedAttention | None:
    """``node`` as the second product of attention that the kernel covers, or None."""
    if not is_call(node, aten.matmul.default) or node_value(node).ndim != 4 or node_value(node).dtype != torch.float32:
        return None
    weights, value = (_quantizer(operand) for operand in node.args[:2])
    if weights is None or value is None or weights.args[2] != 0 or not is_call(weights.args[0], aten.softmax.int):
        return None
    softmax: Any = weights.args[0]
    scores: Any = softmax.args[0]
    if softmax.args[1] not in (-1, 3) or not is_call(scores, aten.matmul.default):
        return None
    query, key = (_quantizer(operand) for operand in scores.args[:2])
    if query is None or key is None or any(len(n.users) != 1 for n in (scores, softmax, weights)):
        return None
    source: Any = query.args[0]
    factor = 1.0
    if is_call(source, aten.mul.Tensor) and isinstance(source.args[1], (int, float)):
        source, factor = source.args[0], float(source.args[1])
    turned: Any = key.args[0]
    keys = _turned(turned)
    inputs = (source, keys, value.args[0])
    values = [node_value(n) if isinstance(n, fx.Node) else None for n in inputs]
    plain = all(isinstance(v, Tensor) and v.ndim == 4 and v.dtype == torch.float32 for v in values)
    if not plain or values[0].shape[3] % DEPTH or values[0].shape[3] != values[2].shape[3]:  # type: ignore[union-attr]
        return None
    return QuantizedAttention(*inputs, factor, (query, key, weights, value))  # type: ignore[arg-type]


class LowerIntegerAttention(GraphPass):
    """Replace attention on dequantized bytes by the integer kernel.

    Before::

        %a = matmul(dequantize(quantize(%q * factor)), dequantize(quantize(transpose(%k))))
        %w = softmax(%a, -1)      %y = matmul(dequantize(quantize(%w)), dequantize(quantize(%v)))

    After::

        %n = tfmq.integer_attention(%q, %k, %v, factor, scales, zero_points)      %y = transpose(%n, 1, 2)

    Legality: both products are exact sums of integers, scaled once; the softmax has zero point 0, so that padding
    adds nothing. All four are bytes by one pair of numbers; a mask between product and softmax is not covered.
    Numerics are preserved up to float rounding.
    Meta: the new nodes take the module stack of the second product.
    """

    id: ClassVar[str] = "tfmq::lower_integer_attention"

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every attention that the kernel covers."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            match = find_quantized_attention(node)
            if match is None:
                continue
            parameters: Any = [quantizer.args[1:3] for quantizer in match.quantizers]
            scales = [float(scale) for scale, _ in parameters]
            zeros = [int(zero_point) for index, (_, zero_point) in enumerate(parameters) if index != SOFTMAX]
            with graph.inserting_before(node):
                operands = (match.query, match.key, match.value, match.factor, scales, zeros)
                new = insert_call(graph, OPERATORS.integer_attention.default, operands, anchor=node)
                turned = insert_call(graph, aten.transpose.int, (new, 1, 2), anchor=node)
            replace_node(node, turned, results=False)
            modified = True
        if modified:
            graph.eliminate_dead_code()
        return modified
