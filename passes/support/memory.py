"""Which memory the values of a graph lie in, and which of it is written to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.tensors import storage_id
from tfmq_fx.passes.support.predicates import writes_in_place

__all__ = ["memory_of", "written_memory"]


def memory_of(node: fx.Node) -> set[int]:
    """The storages that the value of a node lies in."""
    return _storages(node.meta.get("val"))


def written_memory(graph: fx.Graph) -> set[int]:
    """The storages of everything that a call which writes is given."""
    written: set[int] = set()
    for node in graph.nodes:
        if writes_in_place(node):
            written |= _storages(fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val")))
    return written


def _storages(value: Any) -> set[int]:
    return {storage_id(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
