"""Copy inputs and constants that are added to a layer's result: Inductor would write to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import find_schema
from tfmq_fx.passes.support.predicates import is_call

__all__ = ["copy_added_values"]

aten = torch.ops.aten
#: Namespaces of layers that Inductor has fused with a sum, and the names of what they add.
FUSED = ("mkldnn", "onednn")
ADDED = ("other", "qaccum")


def copy_added_values(graph: fx.Graph) -> None:
    """Let sums read copies of inputs and constants, in a graph that Inductor has frozen.

    Inductor computes ``layer(x) + other`` in the memory of ``other`` (oneDNN's ``sum``) without asking whose it is: a
    caller's tensor would change, a kept feature would change with every call, and so would a constant. A product with
    one is a copy that Inductor does not remove.
    """
    copies: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        for position in _added_operands(node):
            other = node.args[position]
            if not isinstance(other, fx.Node) or other.op not in ("placeholder", "get_attr"):
                continue
            if other not in copies:
                with graph.inserting_before(node):
                    copies[other] = graph.call_function(aten.mul.Tensor, (other, 1))
                copies[other].meta["val"] = other.meta["val"]
            node.update_arg(position, copies[other])


def _added_operands(node: fx.Node) -> list[int]:
    """The positions of what may be summed in place: of a sum, the operands of its shape; of a fused layer, by name."""
    if is_call(node, aten.add.Tensor):
        return [position for position in (0, 1) if _has_shape_of(node.args[position], node)]
    schema = find_schema(node.target) if node.op == "call_function" else None
    if schema is None or schema.name.partition("::")[0] not in FUSED:
        return []
    return [position for position, argument in enumerate(schema.arguments) if argument.name in ADDED]


def _has_shape_of(value: Any, result: fx.Node) -> bool:
    tensors: list[Any] = [node.meta.get("val") for node in (value, result) if isinstance(node, fx.Node)]
    if len(tensors) < 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    # As text, because a comparison of symbolic sizes would specialize them.
    return [str(size) for size in tensors[0].shape] == [str(size) for size in tensors[1].shape]
