"""Export a captured graph again: what saving and compiling ahead of time start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from tfmq_fx._torch import pytree
from tfmq_fx._torch.graphs import calling_convention
from tfmq_fx.frontend.sizes import sizes_of

__all__ = ["export_graph"]


def export_graph(
    graph_module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], max_batch: int | None
) -> ExportedProgram:
    """Export a captured graph again, with the same symbolic batch."""
    batch = Dim("batch", min=1, max=max_batch) if max_batch else Dim("batch", min=1)

    def shape(value: Any) -> dict[int, Any] | None:
        sizes = sizes_of(value) if isinstance(value, Tensor) else ()
        multiples = {axis: size.times for axis, size in enumerate(sizes) if not isinstance(size, int)}
        return {axis: batch if times == 1 else times * batch for axis, times in multiples.items()} or None

    shapes = [shape(node.meta.get("val")) for node in graph_module.graph.nodes if node.op == "placeholder"]
    structure = pytree.tree_unflatten(shapes, pytree.tree_structure((args, kwargs)))
    dynamic: Any = structure[0]
    if kwargs:
        names, _ = calling_convention(graph_module.graph)
        dynamic = {**dict(zip(names, structure[0], strict=False)), **structure[1]}
    with torch.no_grad():
        return torch.export.export(graph_module, args, kwargs, dynamic_shapes=dynamic)
