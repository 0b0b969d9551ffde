"""Add the residual where the integer convolution stores its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import called_operator
from tfmq_fx.passes.support.channels_last import LAST, RELABELLINGS, relabel
from tfmq_fx.passes.support.integer_convs import RESIDUAL
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["FuseResidualAdds"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Summand:
    """The result of an integer convolution as it is added: the convolution, and what relabels its result."""

    conv: fx.Node
    chain: tuple[fx.Node, ...]
    #: Whether it is added as an image, channels first; else in the order of the convolution's own memory.
    image: bool


def find_summand(node: Any) -> Summand | None:
    """``node`` as the relabelled result of an integer convolution that adds nothing yet and that nothing else reads."""
    chain: list[fx.Node] = []
    while is_call(node, *RELABELLINGS) and len(node.users) == 1:
        chain.insert(0, node)
        node = node.args[0]
    alone = is_call(node, *RESIDUAL) and node.args[RESIDUAL[node.target]] is None and len(node.users) == 1
    if not alone or not chain:
        return None
    total = [size if isinstance(size, int) else 2 for size in node_value(chain[-1]).shape]
    channels = int(node_value(node).shape[3])
    own = torch.arange(torch.Size(total).numel(), dtype=torch.int32)
    shape = [-1, *node_value(node).shape[1:3], channels]
    relabelled = relabel(own.reshape([int(size) for size in shape]), chain)
    if relabelled is None or list(relabelled.shape) != total:
        return None
    if torch.equal(relabelled.flatten(), own):
        return Summand(node, tuple(chain), image=False)
    if len(total) == 4 and torch.equal(relabelled.permute(LAST).flatten(), own):
        return Summand(node, tuple(chain), image=True)
    return None


def _same_metadata(one: fx.Node, other: fx.Node) -> bool:
    """Whether both are tensors of one shape and dtype, so that neither is broadcast to the other."""
    left, right = node_value(one), node_value(other)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return left.shape == right.shape and left.dtype == right.dtype


class FuseResidualAdds(GraphPass):
    """Let the integer convolution add what is added to its result.

    Before::

        %n = tfmq.integer_conv(%x, …, None, …)      %c = permute(%n, [0, 3, 1, 2])      %y = add(%r, %c)

    After::

        %n = tfmq.integer_conv(%x, …, permute(%r, [0, 2, 3, 1]), …)      %y = permute(%n, [0, 3, 1, 2])

    The same where the result is added as a sequence ``[N, L, C]``, and for a linear whose pixels become an image again.

    Legality: nothing else reads the convolution, and both sides have one shape and dtype, so nothing is broadcast. The
    convolution moves to where the sum was, behind both operands. Numerics are preserved up to float rounding: the
    kernel rounds once, behind the sum.
    Meta: the new nodes take the module stack of the convolution.
    """

    id: ClassVar[str] = "tfmq::fuse_residual_adds"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fuse every sum with an integer convolution on one side; of two convolutions the right one adds."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
                continue
            left, right = node.args
            for one, other in ((right, left), (left, right)):
                summand = find_summand(one) if one is not other else None
                if summand is None or not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
                    continue
                if _same_metadata(one, other):
                    self._fuse(graph, node, summand, other)
                    modified = True
                    break
        if modified:
            graph.eliminate_dead_code()
        return modified

    def _fuse(self, graph: fx.Graph, node: fx.Node, summand: Summand, other: fx.Node) -> None:
        conv = summand.conv
        height, width, channels = (int(size) for size in node_value(conv).shape[1:])
        with graph.inserting_before(node):
            if summand.image:
                other = insert_call(graph, aten.permute.default, (other, LAST), anchor=conv)
            residual = insert_call(graph, aten.reshape.default, (other, [-1, height, width, channels]), anchor=conv)
            place = RESIDUAL[conv.target]
            arguments = (*conv.args[:place], residual, *conv.args[place + 1 :])
            new = insert_call(graph, called_operator(conv), arguments, anchor=conv)
            for step in summand.chain:
                operator, arguments = called_operator(step), (new, *step.args[1:])
                new = insert_call(graph, operator, arguments, anchor=conv, kwargs=dict(step.kwargs))
        replace_node(node, new, results=False)
