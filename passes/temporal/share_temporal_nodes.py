"""Compute equal values of the temporal block once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from torch import fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import replace_node

__all__ = ["ShareTemporalNodes"]


def expression(node: fx.Node) -> Any:
    """What a call computes, as something to compare: operator and arguments, numbers with their types."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return node.target, tuple((type(leaf), leaf) for leaf in leaves), str(spec)


class ShareTemporalNodes(GraphPass):
    """Merge nodes of the temporal block that apply the same operator to the same arguments.

    Before::

        %a = silu(%emb)      %x = linear(%a, %w1, %b1)
        %b = silu(%emb)      %y = linear(%b, %w2, %b2)

    After::

        %a = silu(%emb)      %x = linear(%a, %w1, %b1)      %y = linear(%a, %w2, %b2)

    Legality: the block is free of random and of mutating operators (``find_temporal_block`` refuses such
    a block), so equal operators on equal arguments give equal values; numerics are preserved to the bit.
    Why: every residual block of a UNet applies its own SiLU to the one time embed. Shared, all embedding
    layers read one value, need one observer, and one table of parameters serves them all.
    Meta: the first of the equal nodes keeps its own.

    Args:
        timestep: Name of the timestep placeholder.
        finite: Names of the further inputs that the block may depend on.
    """

    id: ClassVar[str] = "tfmq::share_temporal_nodes"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(self, *, timestep: str = "timestep", finite: Collection[str] = ()) -> None:
        super().__init__()
        self.timestep, self.finite = timestep, finite

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Walk the block in order; a node whose expression was seen before gives way."""
        block = find_temporal_block(graph_module, self.timestep, finite=self.finite)
        first: dict[Any, fx.Node] = {}
        modified = False
        for node in block.nodes:
            if node.op != "call_function" or node not in block:
                continue
            representative = first.setdefault(expression(node), node)
            if representative is not node:
                replace_node(node, representative)
                modified = True
        return modified
