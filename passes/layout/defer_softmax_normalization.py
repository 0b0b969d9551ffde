"""Divide by the sum of a softmax behind the product that reads it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import insert_call, redirect_users, replace_node
from tfmq_fx.passes.support.predicates import is_call, is_matmul, node_value

__all__ = ["DeferSoftmaxNormalization"]

aten = torch.ops.aten


class DeferSoftmaxNormalization(GraphPass):
    """Multiply by the numerators of a softmax, and divide the product by their sum.

    Before::

        %p = softmax(%s, -1)      %y = matmul(%p, %v)

    After::

        %e = exp(sub(%s, amax(%s, [-1], True)))
        %y = div(matmul(%e, %v), sum(%e, [-1], True))

    Why: what is quantized is then the numerator. The largest of each query is 1 exactly, so its range is ``[0, 1]``
    for every query, head, image and timestep, where a softmax over many keys uses few levels of a range that the
    sharpest query sets. The sum is that of the quantized numerators: the weights of a query add up to 1 again,
    and a rounding error counts by how far its value lies from the mean alone.

    Legality: division by a number per query commutes with the product. The softmax is over the last axis, in float32,
    and the product is all that reads it. Numerics are preserved up to the order of float rounding; a query whose
    scores are all minus infinity is NaN, as before. The sum of a query is 1 at least.
    Meta: the numerators take the module stack of the softmax, the division that of the product.
    """

    id: ClassVar[str] = "tfmq::defer_softmax_normalization"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Defer the division of every softmax that a product alone reads."""
        graph = graph_module.graph
        softmaxes = [node for node in graph.nodes if _is_weights_of_product(node)]
        for softmax in softmaxes:
            (product,) = softmax.users
            scores = softmax.args[0]
            with graph.inserting_before(softmax):
                top = insert_call(graph, aten.amax.default, (scores, [-1], True), anchor=softmax)
                below = insert_call(graph, aten.sub.Tensor, (scores, top), anchor=softmax)
                numerators = insert_call(graph, aten.exp.default, (below,), anchor=softmax)
                total = insert_call(graph, aten.sum.dim_IntList, (numerators, [-1], True), anchor=softmax)
            replace_node(softmax, numerators, results=False)
            with graph.inserting_after(product):
                quotient = insert_call(graph, aten.div.Tensor, (product, total), anchor=product)
            redirect_users(product, quotient)
            quotient.update_arg(0, product)
        return bool(softmaxes)


def _is_weights_of_product(node: fx.Node) -> bool:
    """Whether ``node`` is a softmax over the last axis that one product reads, as its first operand."""
    value = node_value(node)
    if not (is_call(node, aten.softmax.int) and isinstance(value, Tensor) and value.dtype == torch.float32):
        return False
    source = node_value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    same = isinstance(source, Tensor) and source.dtype == torch.float32 and node.args[1] in (-1, value.ndim - 1)
    reader = next(iter(node.users), None)
    return (
        same
        and len(node.users) == 1
        and is_matmul(reader)
        and reader.args[0] is node
        and node not in reader.args[1:]
        and node_value(reader).ndim == value.ndim
    )
