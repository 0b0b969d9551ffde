"""Remove dropouts, which are the identity at inference."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import replace_node
from tfmq_fx.passes.support.predicates import is_idle_dropout

__all__ = ["RemoveDropouts"]


class RemoveDropouts(GraphPass):
    """Erase ``aten.dropout`` nodes that drop nothing.

    Before::

        %d = dropout(%x, 0.1, False)      %y = linear(%d, ...)

    After::

        %y = linear(%x, ...)

    Legality: with ``train=False`` or ``p=0`` the op returns its input. A live dropout (``train=True``,
    ``p>0``) is left alone. Numerics are preserved to the bit.
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::remove_dropouts"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Bypass every idle dropout."""
        idle = [node for node in graph_module.graph.nodes if is_idle_dropout(node)]
        for node in idle:
            replace_node(node, node.args[0])
        return bool(idle)
