"""Run the temporal part of a graph alone, over all its timesteps, without an image.

The block may ask for shapes of nodes outside it (``expand`` to the batch of ``sample``); those are
answered from the symbolic shapes in ``meta["val"]``, so nothing outside the block is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.utils import _pytree as pytree

from ..nodes import read_attribute
from ..sizes import concrete_size

__all__ = ["NodeHook", "evaluate_temporal_nodes"]

#: Called as ``hook(node, args, value)`` after each node with its evaluated positional arguments; what it
#: returns is the node's value from then on.
NodeHook = Callable[[fx.Node, tuple[Any, ...], Any], Any]


def _identity(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
    return value


def _stand_in(value: Any, batch: int, device: torch.device) -> Any:
    """A value of the right shape and dtype for a node outside the block; zeros, one element of memory."""
    if isinstance(value, Tensor):
        shape = [concrete_size(size, batch) for size in value.shape]
        return torch.zeros((), dtype=value.dtype, device=device).expand(shape)
    return concrete_size(value, batch)


def _run(graph_module: fx.GraphModule, needed: Collection[fx.Node], timestep: fx.Node, value: Tensor,
         batch: int, hook: NodeHook) -> dict[fx.Node, Any]:  # fmt: skip
    environment: dict[fx.Node, Any] = {timestep: value}

    def lookup(node: fx.Node) -> Any:
        if node not in environment:
            if node.op == "get_attr":
                environment[node] = read_attribute(graph_module, str(node.target))
            else:
                environment[node] = _stand_in(node.meta.get("val"), batch, value.device)
        return environment[node]

    for node in graph_module.graph.nodes:
        if node not in needed or node in environment:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        if node.op == "get_attr":
            result = read_attribute(graph_module, str(node.target))
        elif node.op == "call_module":
            result = graph_module.get_submodule(str(node.target))(*args, **kwargs)
        else:
            result = node.target(*args, **kwargs)
        environment[node] = hook(node, args, result)
    return environment


def _needed(outputs: Sequence[fx.Node], members: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node in found or node not in members:
            continue
        found.add(node)
        queue.extend(node.all_input_nodes)
    return found


@torch.no_grad()
def evaluate_temporal_nodes(
    graph_module: fx.GraphModule,
    members: Collection[fx.Node],
    outputs: Sequence[fx.Node],
    timestep: str,
    values: Tensor,
    *,
    hook: NodeHook = _identity,
) -> list[Tensor]:
    """Evaluate ``outputs`` for every timestep in ``values``; row ``k`` of each result belongs to ``values[k]``.

    Args:
        graph_module: The graph.
        members: The nodes that may be computed (those of a temporal block, and what was inserted into it).
        outputs: The nodes whose values are wanted.
        timestep: Name of the timestep placeholder; its captured shape (0-dim, ``[N]``) is respected.
        values: Timestep values, shape ``[T]``; cast to the placeholder's dtype.
        hook: Sees, and may replace, the value of every node as it is computed.

    Returns:
        One tensor per output, shape ``[T, ...]``: the leading axis is the output's own batch axis when
        the timestep was captured as ``[N]`` or the output carries a batch of one, else a new axis.
    """
    placeholder = next(n for n in graph_module.graph.nodes if n.op == "placeholder" and n.target == timestep)
    example = placeholder.meta["val"]
    device = next((p.device for p in pytree.tree_leaves(list(graph_module.parameters()))), torch.device("cpu"))
    values = values.to(device=device, dtype=example.dtype)
    needed = _needed(outputs, members)
    pieces: list[list[Tensor]] = [[] for _ in outputs]
    for chunk, kept, batch in _chunks(values, example):
        environment = _run(graph_module, needed, placeholder, chunk, batch, hook)
        for piece, node in zip(pieces, outputs, strict=True):
            result = environment[node]
            if example.ndim == 0 and not (result.ndim and result.shape[0] == 1):
                result = result[None]
            piece.append(result[:kept])
    return [torch.cat(piece) for piece in pieces]


def _chunks(values: Tensor, example: Tensor) -> list[tuple[Tensor, int, int]]:
    """Cut ``values`` into timestep arguments of the captured shape: (argument, rows kept, batch)."""
    if example.ndim == 0:
        return [(value, 1, 1) for value in values]
    size = example.shape[0]
    if isinstance(size, SymInt):
        return [(values, len(values), len(values))]
    chunks = []
    for start in range(0, len(values), size):
        piece = values[start : start + size]
        padded = torch.cat([piece, piece[-1:].expand(size - len(piece))])
        chunks.append((padded, len(piece), size))
    return chunks
