"""The weight that a rewrite replaces: a constant, or the rewrite is refused."""

from __future__ import annotations

from tfmq_fx.passes.base import PassError
from tfmq_fx.passes.support.predicates import weight_node
from torch import fx

__all__ = ["constant_weight"]


def constant_weight(node: fx.Node, pass_id: str) -> fx.Node:
    """The ``get_attr`` node that holds the weight of ``node``.

    Raises:
        PassError: The weight is computed; the message names the node.
    """
    weight = weight_node(node)
    if weight is None:
        msg = f"{pass_id}: the weight of node {node.name!r} is computed, not stored; leave that layer to others"
        raise PassError(msg)
    return weight
