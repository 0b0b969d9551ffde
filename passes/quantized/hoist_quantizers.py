"""Quantize before values are only moved, so that what moves is quantized once, and less of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import argument_of, insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call

__all__ = ["HoistQuantizers"]

aten = torch.ops.aten
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
#: Operators whose result holds values of their first argument, each as it is.
MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
)


class HoistQuantizers(GraphPass):
    """Move a per-tensor quantize/dequantize pair in front of operators that only move values.

    Before::

        %u = upsample_nearest2d(%x)      %q = quantize(%u, s, z)      %d = dequantize(%q, s, z)

    After::

        %q = quantize(%x, s, z)      %d = dequantize(%q, s, z)      %u = upsample_nearest2d(%d)

    Legality: rounding to a grid works value by value, so it commutes with views, permutations and nearest upsampling;
    with padding by zeros too where the grid has zero on it. The pair's parameters are constants, the pair is whole
    (the dequantize reads what the quantize wrote, with equal parameters), and nothing else reads the quantized values.
    Other readers of the moved values keep their own copy of the move. Numerics are preserved to the bit.
    Why: engines that compile the graph themselves quantize in the kernel that computes ``%x``, and then move a
    quarter of the bytes. Compilers that match ``dequantize -> conv`` want the pair at the conv.
    Meta: new nodes take the module stack of those that they replace.
    """

    id: ClassVar[str] = "tfmq::hoist_quantizers"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Hoist each pair as far as it goes."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            restored = node if _is_pair(node) else None
            while restored is not None and _moves_values(restored):
                restored = _hoist(graph, restored)
                modified = True
        if modified:
            graph.eliminate_dead_code()
        return modified


def _is_pair(node: fx.Node) -> bool:
    """Whether ``node`` dequantizes what was quantized for it alone, with the same parameters."""
    if not is_call(node, DEQUANTIZE) or not is_call(node.args[0], QUANTIZE):
        return False
    return node.args[1:6] == node.args[0].args[1:6] and len(node.args[0].users) == 1


def _moves_values(restored: fx.Node) -> bool:
    """Whether a pair stands behind an operator that it can change places with."""
    quantize: Any = restored.args[0]
    moved = quantize.args[0]
    if is_call(moved, aten.pad.default):
        constant = argument_of(moved, 2, "mode", "constant") == "constant"
        low, high = quantize.args[3:5]
        return constant and not argument_of(moved, 3, "value", None) and low <= quantize.args[2] <= high
    return is_call(moved, *MOVES)


def _hoist(graph: fx.Graph, restored: fx.Node) -> fx.Node:
    """Change places with one move; return the pair's new dequantize."""
    quantize: Any = restored.args[0]
    moved: Any = quantize.args[0]
    with graph.inserting_before(restored):
        integers = insert_call(graph, QUANTIZE, (moved.args[0], *quantize.args[1:]), anchor=quantize)
        values = insert_call(graph, DEQUANTIZE, (integers, *restored.args[1:]), anchor=restored, kwargs=restored.kwargs)
        again = insert_call(graph, moved.target, (values, *moved.args[1:]), anchor=moved, kwargs=moved.kwargs)
    replace_node(restored, again)
    graph.erase_node(quantize)
    return values
