"""Split fused attention into its two matrix products and the softmax between them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import insert_call, read_attribute, replace_node
from tfmq_fx.passes.support.predicates import is_attention, node_value

__all__ = ["DecomposeAttention"]

aten = torch.ops.aten
POSITION = {"attn_mask": 3, "dropout_p": 4, "is_causal": 5, "scale": 6, "enable_gqa": 7}


def attention_option(node: fx.Node, name: str, default: Any) -> Any:
    """The value of an optional argument of the fused op, given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    position = POSITION[name]
    return node.args[position] if position < len(node.args) else default


def is_plain_attention(node: Any) -> bool:
    """Whether ``node`` is fused attention without dropout, causal mask or grouped queries."""
    if not is_attention(node) or len(node.args) < 3:
        return False
    mask = attention_option(node, "attn_mask", None)
    floating = mask is None or (isinstance(value := node_value(mask), Tensor) and value.is_floating_point())
    return (
        floating
        and not attention_option(node, "dropout_p", 0.0)
        and not attention_option(node, "is_causal", False)
        and not attention_option(node, "enable_gqa", False)
    )


def may_hide_every_key(graph_module: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether an additive mask may be minus infinity for every key of a query; one that is not stored may."""
    if mask.op != "get_attr":
        return True
    values: Tensor = read_attribute(graph_module, str(mask.target))
    return bool((values.amax(-1) == -math.inf).any())


class DecomposeAttention(GraphPass):
    """Replace ``scaled_dot_product_attention`` by matmul, softmax, matmul.

    Before::

        %y = scaled_dot_product_attention(%q, %k, %v, %mask)

    After::

        %s = mul(%q, scale)         %a = matmul(%s, transpose(%k))      %m = add(%a, %mask)
        %p = softmax(%m, -1)        %y = matmul(%p, %v)

    After, where the mask may hide all keys from a query::

        %r = eq(amin(float32(eq(%mask, -inf)), [-1], True), 1)      %m = add(%a, where(%r, 0, %mask))
        %p = softmax(%m, -1)                        %y = where(%r, 0, matmul(%p, %v))

    Legality: the definition of attention (Vaswani et al., 2017, eq. 1), an additive float mask included;
    causal, boolean-masked, grouped and dropped-out attention is left fused. A query that sees no key gives 0, as in
    the fused op, where a softmax of minus infinities alone would be NaN; the softmax stays the one before the second
    product, which later passes look for. Keys are compared before they are reduced: an engine may give the lowest
    finite number as the maximum of minus infinities, and a mask of the lowest finite number hides nothing. Numerics
    are preserved up to the order of float sums. It costs the memory of the attention matrix, so it is run only where
    the matrix products are to be quantized.
    Meta: the new nodes take the module stack of the fused op.
    """

    id: ClassVar[str] = "tfmq::decompose_attention"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Decompose every plain attention."""
        graph = graph_module.graph
        fused = [node for node in graph.nodes if is_plain_attention(node)]
        for node in fused:
            query, key, value = node.args[:3]
            scale = attention_option(node, "scale", None)
            if scale is None:
                scale = 1.0 / math.sqrt(int(node_value(query).shape[-1]))
            mask, hidden = attention_option(node, "attn_mask", None), None
            with graph.inserting_before(node):
                if mask is not None and may_hide_every_key(graph_module, mask):
                    keys = insert_call(graph, aten.eq.Scalar, (mask, -math.inf), anchor=node)
                    counted = insert_call(graph, aten.to.dtype, (keys, torch.float32), anchor=node)
                    least = insert_call(graph, aten.amin.default, (counted, [-1], True), anchor=node)
                    hidden = insert_call(graph, aten.eq.Scalar, (least, 1.0), anchor=node)
                    mask = insert_call(graph, aten.where.ScalarSelf, (hidden, 0.0, mask), anchor=node)
                scaled = insert_call(graph, aten.mul.Tensor, (query, scale), anchor=node)
                transposed_key = insert_call(graph, aten.transpose.int, (key, -2, -1), anchor=node)
                scores = insert_call(graph, aten.matmul.default, (scaled, transposed_key), anchor=node)
                if mask is not None:
                    scores = insert_call(graph, aten.add.Tensor, (scores, mask), anchor=node)
                weights = insert_call(graph, aten.softmax.int, (scores, -1), anchor=node)
                mixed = insert_call(graph, aten.matmul.default, (weights, value), anchor=node)
                if hidden is not None:
                    mixed = insert_call(graph, aten.where.ScalarSelf, (hidden, 0.0, mixed), anchor=node)
            replace_node(node, mixed)
        return bool(fused)
