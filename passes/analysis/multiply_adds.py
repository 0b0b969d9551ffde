"""Count the multiply-adds of each operator, and tell operators that multiply from those that do not.

An operator multiplies when it computes sums of products of two of its operands, whatever it is called: what torch
itself breaks down into matrix products and convolutions is counted by doing so on tensors without memory. The few that
torch has a kernel of their own for stand in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from tfmq_fx._torch import pytree
from tfmq_fx._torch.operators import OpOverload
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.support.sizes import concrete_size

__all__ = ["multiply_adds"]

aten, higher_order = torch.ops.aten, torch.ops.higher_order

#: Namespaces whose operators are known not to multiply where nothing is counted.
KNOWN = ("aten", "prims", "quantized_decomposed", "tfmq_fx", "tfmq")


def multiply_adds(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """How many products each multiplying node of a graph adds up, in graph order.

    Args:
        graph_module: A captured graph, at any later stage; it is not changed.

    Returns:
        The count for one item where the batch is symbolic, else for the whole batch. An operator of others that reads
        a matrix of weights is listed with 0: nobody knows what it does.
    """
    cached: dict[tuple[Any, str], int] = {}
    counts: dict[fx.Node, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and _may_multiply(node.target):
            args, kwargs = _arguments(node)
            leaves = pytree.tree_leaves((args, kwargs))
            key = node.target, str([(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in leaves])
            if key not in cached:
                cached[key] = _count(node.target, args, kwargs)
            if cached[key] or _is_foreign(node):
                counts[node] = cached[key]
    return counts


def _may_multiply(target: Any) -> bool:
    if target in FORMULAS:
        return True
    return isinstance(target, OpOverload) and torch.Tag.pointwise not in target.tags


def _is_foreign(node: fx.Node) -> bool:
    """Whether ``node`` calls an operator that nothing is known of, on a matrix of weights."""
    if not isinstance(node.target, OpOverload) or node.target.namespace in KNOWN:
        return False
    return any(source.op == "get_attr" and _rank(node_value(source)) > 1 for source in node.all_input_nodes)


def _rank(value: Any) -> int:
    return int(value.ndim) if isinstance(value, Tensor) else 0


def _arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as tensors without memory, for a batch of one."""

    def of(source: fx.Node) -> Any:
        value = node_value(source)
        if isinstance(value, Tensor):
            sizes = [max(1, int(concrete_size(size, 1))) for size in value.shape]
            return torch.empty(sizes, dtype=value.dtype, device="meta")
        return int(concrete_size(value, 1)) if isinstance(value, SymInt) else value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), of)
    return tuple(args), dict(kwargs)


def _count(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The multiply-adds of one call, as torch counts floating-point operations; 0 where it cannot be called so."""
    if sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))) < 2:
        return 0
    if target in FORMULAS:
        return int(FORMULAS[target](*args))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            target(*args, **kwargs)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return 0
    return int(counter.get_total_flops()) // 2


# -- what torch has kernels of their own for --------------------------------------------------------------------------


def _vectors(x: Tensor) -> int:
    return int(math.prod(x.shape[:-1]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return _vectors(query) * int(key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _multi_head(query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, qkv: Tensor, _: Any, out: Tensor,
                *rest: Any) -> int:  # fmt: skip
    return _vectors(query) * (qkv.numel() + out.numel()) + 2 * _vectors(query) * key.shape[-2] * width


def _encoder_layer(x: Tensor, width: int, heads: int, qkv: Tensor, _: Any, out: Tensor, *rest: Any) -> int:
    first, second = rest[8], rest[10]
    return _multi_head(x, x, x, width, heads, qkv, None, out) + _vectors(x) * int(first.numel() + second.numel())


FORMULAS: dict[Any, Callable[..., int]] = {
    aten.bilinear.default: lambda left, right, weight, *_: _vectors(left) * weight.numel(),
    aten.addbmm.default: lambda _, left, right, *rest: left.numel() * right.shape[-1],
    aten.mv.default: lambda matrix, vector: matrix.numel(),
    aten.addmv.default: lambda _, matrix, vector, *rest: matrix.numel(),
    aten.dot.default: lambda left, right: left.numel(),
    aten.conv_tbc.default: lambda x, weight, *_: _vectors(x) * weight.numel(),
    aten.embedding_bag.padding_idx: lambda weight, indices, *_: indices.numel() * weight.shape[-1],
    aten.embedding_bag.default: lambda weight, indices, *_: indices.numel() * weight.shape[-1],
    aten._embedding_bag.default: lambda weight, indices, *_: indices.numel() * weight.shape[-1],
    aten._embedding_bag_forward_only.default: lambda weight, indices, *_: indices.numel() * weight.shape[-1],
    aten._native_multi_head_attention.default: _multi_head,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    higher_order.flex_attention: _attention,
}
