"""Compute a new value where an operator writes into its argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import OpOverload, functional_twin, schema_of
from tfmq_fx._torch.tensors import storage_id
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of

__all__ = ["ReplaceInPlace"]

aten = torch.ops.aten


def functional_overload(target: Any) -> OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None for what does not write to its first argument alone."""
    if not isinstance(target, OpOverload) or target.namespace != "aten" or not schema_of(target).is_mutable:
        return None
    written = [
        argument.alias_info is not None and argument.alias_info.is_write for argument in schema_of(target).arguments
    ]
    if written != [True, *[False] * (len(written) - 1)]:
        return None
    functional = functional_twin(target)
    return None if functional is None or schema_of(functional).is_mutable else functional


def memory_of(node: fx.Node) -> set[int]:
    """Which storages the value of ``node`` lies in."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {storage_id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


class ReplaceInPlace(GraphPass):
    """Replace an operator that writes into a computed value by the one that computes a new value.

    Before::

        %h = conv2d(%x, %w)
        %r = relu_(%h)
        %y = add(%h, %x)

    After::

        %h = conv2d(%x, %w)
        %r = relu(%h)
        %y = add(%r, %x)

    Legality: what is written to is no input and no weight, whose change could be seen from outside; nothing else that
    lies in the same memory, a view or what it is a view of, is read afterwards; and the new value has the shape and
    dtype of the old. Then whoever read the old value afterwards reads the new one. Numerics are preserved to the bit.
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::replace_in_place"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace the calls in order, so that the result of one may be written to by the next."""
        order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
        memory = {node: memory_of(node) for node in order}
        modified = False
        for node in order:
            modified = _replace(node, order, memory) or modified
        return modified


def _replace(node: fx.Node, order: Mapping[fx.Node, int], memory: Mapping[fx.Node, set[int]]) -> bool:
    target = functional_overload(node.target) if node.op == "call_function" else None
    if target is None or not isinstance(node.args[0], fx.Node):
        return False
    written = node.args[0]
    shared = [other for other in order if order[other] < order[node] and memory[other] & memory[written]]
    later = {other: [user for user in other.users if order[user] > order[node]] for other in shared}
    if any(other.op != "call_function" or (other is not written and later[other]) for other in shared):
        return False
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    value = compute_value(fake_mode_of(node.graph), target, args, kwargs)
    if not _same_metadata(value, written.meta["val"]):
        return False
    for user in later[written]:
        user.replace_input_with(written, node)
    # Its recorded value stays: it has this shape and dtype, and shares its memory with the views that are made of it.
    node.target = target
    return True


def _same_metadata(value: Any, other: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(other, Tensor)
        and value.dtype == other.dtype
        and tuple(map(str, value.shape)) == tuple(map(str, other.shape))
    )
