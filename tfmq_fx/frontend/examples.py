"""Example inputs for a captured graph, made from its own placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.frontend.sizes import sizes_of
from tfmq_fx.passes.support.predicates import node_value

__all__ = ["EXAMPLE_BATCH", "batch_symbol", "example_arguments"]

#: Batch of the examples: two, because a batch of one is a special case to a compiler.
EXAMPLE_BATCH = 2


def batch_symbol(graph_module: fx.GraphModule) -> Any | None:
    """The symbol of the batch size, or None when every size is fixed."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and isinstance(node_value(node), Tensor):
            for size in node_value(node).shape:
                if isinstance(size, SymInt):
                    return next(iter(size.node.expr.free_symbols))
    return None


def _example(node: fx.Node, indexed: Mapping[str, Tensor], generator: torch.Generator) -> Any:
    value = node_value(node)
    if not isinstance(value, Tensor):
        return value
    shape = [size if isinstance(size, int) else EXAMPLE_BATCH * size.times for size in sizes_of(value)]
    if str(node.target) in indexed:
        allowed = indexed[str(node.target)]
        count = shape[0] if shape else 1
        picked = allowed[torch.linspace(0, len(allowed) - 1, count).round().long()]
        return (picked if shape else picked[0]).to(value.dtype)
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.zeros(shape, dtype=value.dtype)


def example_arguments(
    graph_module: fx.GraphModule, indexed: Mapping[str, Tensor] | None = None, *, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make ``(args, kwargs)`` that the graph can be called with: noise, and timesteps from its table.

    Args:
        graph_module: A captured graph, at any later stage.
        indexed: By name, the values to take an input from, ``[K]``: those that index the table.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = [_example(node, indexed or {}, generator) for node in graph_module.graph.nodes if node.op == "placeholder"]
    args, kwargs = pytree.tree_unflatten(flat, calling_convention(graph_module.graph)[1])
    return tuple(args), dict(kwargs)
