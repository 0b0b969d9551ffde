"""Run quantized attention on our own integer kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.kernels import MAX_BYTE_PRODUCTS, OPERATORS, weights_fit
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.byte_quantizers import ByteQuantizer, dequantized_bytes
from tfmq_fx.passes.support.nodes import add_buffer, argument_of, insert_call, insert_get_attr, replace_node
from tfmq_fx.passes.support.predicates import fqn, is_call, node_value, softmax_scores
from tfmq_fx.passes.support.sizes import is_same_size

__all__ = ["LowerIntegerAttention"]

aten = torch.ops.aten
#: The kernel walks the depth by this many bytes; which of the four quantizers is that of the softmax.
DEPTH, SOFTMAX = 4, 2
#: What the buffers of a table are called.
KEYS = ("scales", "zero_points")


@dataclass(frozen=True)
class QuantizedAttention:
    """Attention on bytes: its inputs in float, and the quantizers of query, key, softmax and value."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    factor: float
    quantizers: tuple[ByteQuantizer, ByteQuantizer, ByteQuantizer, ByteQuantizer]
    deferred: bool

    @property
    def rows(self) -> fx.Node | None:
        """The row of each item, where one of them has a table."""
        return next((quantizer.table.rows for quantizer in self.quantizers if quantizer.table is not None), None)


def _transposed(node: Any) -> fx.Node | None:
    """What ``node`` transposes in its last two axes."""
    if not is_call(node, aten.transpose.int) or {axis % node_value(node).ndim for axis in node.args[1:3]} != {2, 3}:
        return None
    source: Any = node.args[0]
    return source if isinstance(source, fx.Node) else None


def find_quantized_attention(node: fx.Node) -> QuantizedAttention | None:
    """``node`` as the end of attention that the kernel covers, or None: its second product, or what divides that."""
    product: Any = node.args[0] if (deferred := is_call(node, aten.div.Tensor)) else node
    if (
        not is_call(product, aten.matmul.default)
        or node_value(node).ndim != 4
        or node_value(node).dtype != torch.float32
    ):
        return None
    weights, value = (dequantized_bytes(operand) for operand in product.args[:2])
    if weights is None or value is None or any(weights.zero_points):
        return None
    softmax: Any = weights.node.args[0]
    scores = _deferred_scores(softmax, product, node) if deferred else _normalized_scores(softmax, weights.node)
    if not is_call(scores, aten.matmul.default):
        return None
    query, key = (dequantized_bytes(operand) for operand in scores.args[:2])
    if query is None or key is None or len(softmax.users) != 1:
        return None
    source: Any = query.node.args[0]
    factor = 1.0
    if is_call(source, aten.mul.Tensor) and isinstance(source.args[1], (int, float)):
        source, factor = source.args[0], float(source.args[1])
    inputs: tuple[Any, Any, Any] = (source, _transposed(key.node.args[0]), value.node.args[0])
    values = [node_value(n) if isinstance(n, fx.Node) else None for n in inputs]
    if not _is_covered(node, values, min(weights.scales), deferred):
        return None
    quantizers = (query, key, weights, value)
    if not _is_one_table(quantizers, values[1:], node):
        return None
    keys, of_values = (_repeated_heads(n) for n in inputs[1:])
    # Grouped queries: the kernel repeats the heads itself, up to the number of the query's.
    if keys[1] == of_values[1] and is_same_size(node_value(source).shape[1], node_value(node).shape[1]):
        inputs = (source, keys[0], of_values[0])
    return QuantizedAttention(*inputs, factor, quantizers, deferred)


def _normalized_scores(softmax: Any, weights: fx.Node) -> fx.Node | None:
    """The scores that ``softmax`` is of, where one product alone reads its dequantized ``weights``."""
    if not is_call(softmax, aten.softmax.int) or softmax.args[1] not in (-1, 3) or len(weights.users) != 1:
        return None
    scores: Any = softmax.args[0]
    return scores if isinstance(scores, fx.Node) and len(scores.users) == 1 else None


def _deferred_scores(numerators: Any, product: fx.Node, quotient: fx.Node) -> fx.Node | None:
    """The scores of dequantized ``numerators``, where ``quotient`` divides their ``product`` by their sum alone."""
    total: Any = quotient.args[1]
    scores = softmax_scores(numerators)
    whole = is_call(total, aten.sum.dim_IntList) and tuple(total.args) == (product.args[0], [-1], True)
    if scores is None or not whole or total.kwargs or quotient.kwargs:
        return None
    readers = set(product.all_input_nodes[0].users)
    alone = len(product.users) == len(total.users) == 1 and readers == {product, total}
    # The scores are read twice, and so are the numerators' parts by nothing else.
    return scores if alone and len(scores.users) == 2 else None


def _is_one_table(quantizers: Sequence[ByteQuantizer], sources: Sequence[Any], node: fx.Node) -> bool:
    """Whether all that have tables have the same rows of as many; keys and values of one image for all have numbers."""
    tables = [quantizer.table for quantizer in quantizers]
    rows = {table.rows for table in tables if table is not None}
    counts = {len(quantizer.scales) for quantizer in quantizers if quantizer.table is not None}
    own = zip((tables[1], tables[3]), sources, strict=True)
    several = not is_same_size(node_value(node).shape[0], 1)
    shared = several and any(table is not None and is_same_size(x.shape[0], 1) for table, x in own)
    return len(rows) <= 1 and len(counts) <= 1 and not shared


def _repeated_heads(node: Any) -> tuple[fx.Node, int]:
    """What ``node`` repeats each head of, and how often; ``node`` itself, once, otherwise."""
    if not is_call(node, aten.repeat_interleave.self_int) or node.kwargs.keys() - {"dim"} or len(node.args) > 3:
        return node, 1
    source: Any = node.args[0]
    times: Any = node.args[1]
    axis = argument_of(node, 2, "dim", None)
    grouped = node_value(source).ndim == 4 and axis in (1, -3) and isinstance(times, int)
    return (source, times) if grouped else (node, 1)


def _is_covered(node: fx.Node, values: list[Any], softmax_scale: Any, deferred: bool) -> bool:
    """Whether query, key and value, as they enter attention, are what the kernel reads."""
    if not all(isinstance(value, Tensor) and value.ndim == 4 and value.dtype == torch.float32 for value in values):
        return False
    depth, keys = values[0].shape[3], values[1].shape[2]
    # The depth is walked by four bytes, and the result has the query's; an int32 holds the sums of both products.
    if not is_same_size(depth, values[2].shape[3]) or depth % DEPTH or not 0 < depth <= MAX_BYTE_PRODUCTS:
        return False
    # How many keys there are has to be known for that, and a softmax is of one at least.
    if not isinstance(keys, int) or keys < 1 or not weights_fit(keys, softmax_scale, deferred):
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

    or, where the division by the softmax's sum is deferred::

        %e = dequantize(quantize(exp(sub(%a, amax(%a, [-1], True)))))
        %y = div(matmul(%e, dequantize(quantize(%v))), sum(%e, [-1], True))

    After::

        %n = tfmq.integer_attention(%q, %k, %v, factor, scales, zero_points, deferred)      %y = transpose(%n, 1, 2)

    Where a quantizer has a row of a table for each item, ``integer_attention.rows`` takes the table and the rows.
    Where keys and values are ``repeat_interleave(%k, n, 1)``, the kernel takes ``%k`` and repeats it itself.

    Legality: both products are exact sums of integers, scaled once, that no int32 can be too small for; the softmax
    has zero point 0, so that padding adds nothing. All four are bytes by one pair of numbers; a mask between product
    and softmax is not covered. Operands of one image or head are broadcast as ``matmul`` does it.
    Numerics are preserved up to float rounding.
    Meta: the new nodes take the module stack of the last node that they replace.
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
            with graph.inserting_before(node):
                new = self._insert(graph_module, match, node)
                transposed = insert_call(graph, aten.transpose.int, (new, 1, 2), anchor=node)
            replace_node(node, transposed, results=False)
            modified = True
        if modified:
            graph.eliminate_dead_code()
        return modified

    def _insert(self, graph_module: fx.GraphModule, match: QuantizedAttention, node: fx.Node) -> fx.Node:
        graph, operator = graph_module.graph, OPERATORS.integer_attention
        inputs = (match.query, match.key, match.value, match.factor)
        if match.rows is None:
            scales = [quantizer.scales[0] for quantizer in match.quantizers]
            zeros = [q.zero_points[0] for index, q in enumerate(match.quantizers) if index != SOFTMAX]
            return insert_call(graph, operator.default, (*inputs, scales, zeros, match.deferred), anchor=node)
        tables = [
            torch.tensor(columns, dtype=dtype).T.contiguous()
            for columns, dtype in (
                (_columns([quantizer.scales for quantizer in match.quantizers]), torch.float32),
                (_columns([quantizer.zero_points for quantizer in match.quantizers]), torch.int64),
            )
        ]
        names = [add_buffer(graph_module, f"{fqn(node)}_{key}", table) for key, table in zip(KEYS, tables, strict=True)]
        operands = [insert_get_attr(graph_module, name, anchor=node) for name in names]
        return insert_call(graph, operator.rows, (*inputs, *operands, match.rows, match.deferred), anchor=node)


def _columns(values: Sequence[list[Any]]) -> list[list[Any]]:
    """Numbers by row of the table, where one stands for all rows."""
    count = max(len(column) for column in values)
    return [column * count if len(column) == 1 else column for column in values]
