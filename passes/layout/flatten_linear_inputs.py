"""Give every linear layer a two-dimensional input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["FlattenLinearInputs"]

aten = torch.ops.aten


def has_batched_input(node: Any) -> bool:
    """Whether ``node`` is a linear whose input has more than two axes."""
    if not is_call(node, aten.linear.default):
        return False
    value = node_value(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return isinstance(value, Tensor) and value.ndim > 2


class FlattenLinearInputs(GraphPass):
    """Fold the leading axes of a linear's input into one.

    Before::

        %y = linear(%x, %w, %b)                        # %x: [N, L, C]

    After::

        %f = reshape(%x, [-1, C])      %z = linear(%f, %w, %b)      %y = view(%z, [N, L, K])

    Linears that read one value read one ``%f``: what quantizes it is one quantizer then, as queries, keys and values
    want it.

    Legality: a linear treats all leading axes alike. Numerics are preserved (the same matrix product).
    Why: Inductor's integer kernels match two-dimensional linears always, but attention's projections,
    whose input is a transpose, only sometimes: with a dynamic batch the match raises, with a static one
    it stays a float ``bmm``.
    Meta: the new nodes take the module stack of the linear.
    """

    id: ClassVar[str] = "tfmq::flatten_linear_inputs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fold and unfold around every linear with a batched input."""
        graph = graph_module.graph
        batched = [node for node in graph.nodes if has_batched_input(node)]
        flattened: dict[fx.Node, fx.Node] = {}
        for node in batched:
            source: Any = node.args[0]
            value, out = node_value(source), node_value(node)
            with graph.inserting_before(node):
                sizes: list[Any] = [
                    size
                    if isinstance(size, int)
                    else insert_call(graph, aten.sym_size.int, (source, axis), anchor=node)
                    for axis, size in enumerate(value.shape[:-1])
                ]
                if source not in flattened:
                    shape = [-1, int(value.shape[-1])]
                    flattened[source] = insert_call(graph, aten.reshape.default, (source, shape), anchor=node)
                operands = (flattened[source], *node.args[1:])
                linear = insert_call(graph, node.target, operands, anchor=node, kwargs=dict(node.kwargs))
                shaped = insert_call(graph, aten.view.default, (linear, [*sizes, int(out.shape[-1])]), anchor=node)
            replace_node(node, shaped)
        return bool(batched)
