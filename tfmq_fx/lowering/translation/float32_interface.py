"""Give an engine a graph whose inputs and results are float32, and cast to and from the program's types outside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.passes.support.nodes import fake_mode_of, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["as_float32", "with_types_of"]

aten = torch.ops.aten


def _is_cast_type(node: fx.Node) -> bool:
    value = node_value(node)
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float32


def as_float32(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph without the casts at its interface, a copy; itself where it is float32 there.

    Engines exchange arrays of numpy's, which has no bfloat16, and compute in few types themselves.
    """
    graph = graph_module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder" and _is_cast_type(node)]
    if not inputs and not any(map(_is_cast_type, graph.output_node().all_input_nodes)):
        return graph_module
    copied = copy.deepcopy(graph_module)
    graph = copied.graph
    for node in [node for node in graph.nodes if node.op == "placeholder" and _is_cast_type(node)]:
        with fake_mode_of(graph):
            node.meta["val"] = node_value(node).to(torch.float32)
        for reader in [user for user in node.users if is_call(user, aten.to.dtype) and user.args[1] is torch.float32]:
            replace_node(reader, node)
    for node in graph.output_node().all_input_nodes:
        if _is_cast_type(node) and is_call(node, aten.to.dtype):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            replace_node(node, source)
    copied.recompile()
    return copied


def with_types_of(graph_module: fx.GraphModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which takes and returns float32, called with the types of ``graph_module``'s inputs and results."""
    results = pytree.tree_leaves(graph_module.graph.output_node().args[0])
    types = [node_value(leaf).dtype if isinstance(leaf, fx.Node) and _is_cast_type(leaf) else None for leaf in results]

    def cast(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(cast, (args, kwargs))
        leaves, structure = pytree.tree_flatten(run(*args, **kwargs))
        typed = [leaf if dtype is None else leaf.to(dtype) for leaf, dtype in zip(leaves, types, strict=True)]
        return pytree.tree_unflatten(typed, structure)

    return called
