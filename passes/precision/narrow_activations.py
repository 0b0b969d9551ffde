"""Pass activations between the integer kernels in bfloat16."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_list, argument_node, called_operator
from tfmq_fx.passes.support.channels_last import RELABELLINGS
from tfmq_fx.passes.support.integer_convs import DTYPE, READS_FLOATS, RESIDUAL
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["NarrowActivations"]

aten = torch.ops.aten
NORMS = (
    OPERATORS.group_norm.default,
    OPERATORS.quantized_group_norm.default,
    OPERATORS.quantized_group_norm.rows,
)
IMAGES = (OPERATORS.quantized_image.default, OPERATORS.quantized_image.rows)
ATTENTION = (OPERATORS.integer_attention.default, OPERATORS.integer_attention.rows)
#: The three inputs of attention are its first arguments.
INPUTS = 3


class NarrowActivations(GraphPass):
    """Let the integer convolutions store bfloat16, and the kernels behind them read it.

    Before::

        %c = tfmq.integer_conv(%x, …, %r, …, float32)      %q = tfmq.quantized_group_norm([permute(%c)], …)

    After::

        %s = to(%r, bfloat16)      %c = tfmq.integer_conv(%x, …, %s, …, bfloat16)
        %q = tfmq.quantized_group_norm([permute(%c)], …)

    What is no kernel of ours reads ``to(%c, float32)``. Sums, normalization and softmax stay in float32 inside the
    kernels; only what passes between them is rounded.

    Legality: none is needed for the shapes; the numerics change, by 2^-9 relative for each value that is stored, an
    order of magnitude below the step of the 8 bits it is quantized to next. Why: the kernels are as fast as their
    stores; half the bytes also keep a batch in the caches.
    Meta: the new nodes take the module stack of what they replace.
    """

    id: ClassVar[str] = "tfmq::narrow_activations"
    numerics: ClassVar[Numerics] = Numerics.CHANGED

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Narrow in one sweep: what a node reads was narrowed before it."""
        graph = graph_module.graph
        narrow: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if is_call(node, *DTYPE) and node.args[DTYPE[node.target]] == torch.float32:
                arguments = list(node.args)
                place = RESIDUAL[node.target]
                if arguments[place] is not None:
                    arguments[place] = self._narrowed(graph, arguments[place], narrow, node)
                if is_call(node, *READS_FLOATS) and arguments[0] in narrow:
                    arguments[0] = narrow[argument_node(node, 0)]
                arguments[DTYPE[node.target]] = torch.bfloat16
                self._replace(graph, node, tuple(arguments), narrow)
            elif is_call(node, *RELABELLINGS) and node.args[0] in narrow:
                self._replace(graph, node, (narrow[argument_node(node, 0)], *node.args[1:]), narrow)
            elif is_call(node, *IMAGES) and node.args[0] in narrow:
                node.args = (narrow[argument_node(node, 0)], *node.args[1:])
            elif is_call(node, *NORMS) and any(part in narrow for part in argument_list(node, 0)):
                node.args = (
                    [self._narrowed(graph, part, narrow, node) for part in argument_list(node, 0)],
                    *node.args[1:],
                )
            elif is_call(node, *ATTENTION) and all(n in narrow for n in node.args[:INPUTS]):
                inputs = [narrow[argument_node(node, position)] for position in range(INPUTS)]
                self._replace(graph, node, (*inputs, *node.args[INPUTS:]), narrow)
        if narrow:
            graph.eliminate_dead_code()
        return bool(narrow)

    def _narrowed(self, graph: fx.Graph, node: Any, narrow: dict[fx.Node, fx.Node], anchor: fx.Node) -> fx.Node:
        """The narrow form of ``node``, made by a cast before ``anchor`` where there is none."""
        if node in narrow:
            return narrow[node]
        if node_value(node).dtype == torch.bfloat16:
            return node  # type: ignore[no-any-return]  # metadata has no type
        with graph.inserting_before(anchor):
            return insert_call(graph, aten.to.dtype, (node, torch.bfloat16), anchor=anchor)

    def _replace(self, graph: fx.Graph, node: fx.Node, arguments: Any, narrow: dict[fx.Node, fx.Node]) -> None:
        """Replace ``node`` by itself with narrow ``arguments``, widened again for whoever needs that."""
        with graph.inserting_before(node):
            new = insert_call(graph, called_operator(node), arguments, anchor=node, kwargs=dict(node.kwargs))
            wide = insert_call(graph, aten.to.dtype, (new, torch.float32), anchor=node)
        replace_node(node, wide)
        narrow[wide] = new
