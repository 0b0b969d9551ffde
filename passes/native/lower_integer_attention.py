"""Run quantized attention on our own integer kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.kernels import MAX_BYTE_PRODUCTS, OPERATORS, weights_fit
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.channels_last import is_byte_quantizer
from tfmq_fx.passes.support.nodes import argument_of, insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.sizes import is_same_size

__all__ = ["LowerIntegerAttention"]

aten = torch.ops.aten
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


def _transposed(node: Any) -> fx.Node | None:
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
    inputs: tuple[Any, Any, Any] = (source, _transposed(key.args[0]), value.args[0])
    if not _is_covered(node, [node_value(n) if isinstance(n, fx.Node) else None for n in inputs], weights.args[1]):
        return None
    keys, values = (_repeated_heads(n) for n in inputs[1:])
    # Grouped queries: the kernel repeats the heads itself, up to the number of the query's.
    if keys[1] == values[1] and is_same_size(node_value(source).shape[1], node_value(node).shape[1]):
        inputs = (source, keys[0], values[0])
    return QuantizedAttention(*inputs, factor, (query, key, weights, value))


def _repeated_heads(node: Any) -> tuple[fx.Node, int]:
    """What ``node`` repeats each head of, and how often; ``node`` itself, once, otherwise."""
    if not is_call(node, aten.repeat_interleave.self_int) or node.kwargs.keys() - {"dim"} or len(node.args) > 3:
        return node, 1
    source: Any = node.args[0]
    times: Any = node.args[1]
    axis = argument_of(node, 2, "dim", None)
    grouped = node_value(source).ndim == 4 and axis in (1, -3) and isinstance(times, int)
    return (source, times) if grouped else (node, 1)


def _is_covered(node: fx.Node, values: list[Any], softmax_scale: Any) -> bool:
    """Whether query, key and value, as they enter attention, are what the kernel reads."""
    if not all(isinstance(value, Tensor) and value.ndim == 4 and value.dtype == torch.float32 for value in values):
        return False
    depth, keys = values[0].shape[3], values[1].shape[2]
    # The depth is walked by four bytes, and the result has the query's; an int32 holds the sums of both products.
    if not is_same_size(depth, values[2].shape[3]) or depth % DEPTH or not 0 < depth <= MAX_BYTE_PRODUCTS:
        return False
    # How many keys there are has to be known for that, and a softmax is of one at least.
    if not isinstance(keys, int) or keys < 1 or not weights_fit(keys, softmax_scale):
        return False
    # Batch and heads are the result's, or 1, which the kernel repeats as matmul does; heads are known here.
    whole = node_value(node).shape[:2]
    return isinstance(whole[1], int) and all(
        is_same_size(size, 1) or is_same_size(size, total)
        for value in values
        for size, total in zip(value.shape[:2], whole, strict=True)
    )


class LowerIntegerAttention(GraphPass):
    """Replace attention on dequantized bytes by the integer kernel.

    Before::

        %a = matmul(dequantize(quantize(%q * factor)), dequantize(quantize(transpose(%k))))
        %w = softmax(%a, -1)      %y = matmul(dequantize(quantize(%w)), dequantize(quantize(%v)))

    After::

        %n = tfmq.integer_attention(%q, %k, %v, factor, scales, zero_points)      %y = transpose(%n, 1, 2)

    Where keys and values are ``repeat_interleave(%k, n, 1)``, the kernel takes ``%k`` and repeats it itself.

    Legality: both products are exact sums of integers, scaled once, that no int32 can be too small for; the softmax
    has zero point 0, so that padding adds nothing. All four are bytes by one pair of numbers; a mask between product
    and softmax is not covered. Operands of one image or head are broadcast as ``matmul`` does it.
    Numerics are preserved up to float rounding.
    Meta: the new nodes take the module stack of the second product.
    """

    id: ClassVar[str] = "tfmq::lower_integer_attention"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

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
                transposed = insert_call(graph, aten.transpose.int, (new, 1, 2), anchor=node)
            replace_node(node, transposed, results=False)
            modified = True
        if modified:
            graph.eliminate_dead_code()
        return modified
