"""Projection shortcuts: pointwise convolutions that carry a residual stream past a branch, in other channels."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.analysis.layer_names import seen_through_observers
from tfmq_fx.passes.analysis.reachability import Reachability
from tfmq_fx.passes.analysis.residual_joins import is_sum, is_sum_of_parts
from tfmq_fx.passes.support.predicates import is_call, is_conv, node_value

__all__ = ["find_shortcuts"]

aten = torch.ops.aten
COPIES = (aten.contiguous.default, aten.clone.default)
QUANTIZERS = (
    decomposed.quantize_per_tensor.default,
    decomposed.dequantize_per_tensor.default,
    decomposed.quantize_per_channel.default,
    decomposed.dequantize_per_channel.default,
)


def find_shortcuts(graph: fx.Graph) -> list[fx.Node]:
    """The pointwise convolutions whose result is added to something else that comes of what they read.

    Args:
        graph: A captured graph, prepared or not. A convolution of a concatenation may be taken apart into a sum.

    Returns:
        Their nodes in graph order: ``y = f(x) + conv(x)`` with a kernel of one pixel and any ``f`` (He et al., *Deep
        Residual Learning*, CVPR 2016, section 3.2).
    """
    pointwise = [node for node in graph.nodes if is_conv(node) and _is_pointwise(node)]
    if not pointwise:
        return []
    reachability = Reachability(graph)
    return [node for node in pointwise if _rejoins(node, reachability)]


def _is_pointwise(conv: fx.Node) -> bool:
    weight = conv.args[1]
    value = node_value(seen_through_observers(weight)) if isinstance(weight, fx.Node) else None
    return isinstance(value, Tensor) and all(size == 1 for size in value.shape[2:])


def _stream(conv: fx.Node) -> fx.Node:
    """What ``conv`` reads, before it was observed or quantized and its channels were scaled."""
    node = conv.args[0]
    assert isinstance(node, fx.Node)
    while (source := _passed_on(node)) is not None:
        node = source
    return node


def _passed_on(node: fx.Node) -> fx.Node | None:
    """What ``node`` observes, quantizes, dequantizes, copies or multiplies by stored factors; None of another node."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    scales = is_call(node, aten.mul.Tensor) and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
    return source if node.op == "call_module" or is_call(node, *QUANTIZERS, *COPIES) or scales else None


def _rejoins(conv: fx.Node, reachability: Reachability) -> bool:
    """Whether a sum that ``conv`` reaches by sums alone adds something that comes of what it reads."""
    stream, pending = _stream(conv), [conv]
    while pending:
        node = pending.pop()
        pending += [user for user in node.users if is_call(user, *COPIES)]
        for user in filter(is_sum, node.users):
            others = [operand for operand in user.all_input_nodes if operand is not node]
            parts = is_sum_of_parts(user, reachability)
            if not parts and any(reachability.reaches(stream, other) for other in others):
                return True
            pending.append(user)
    return False
