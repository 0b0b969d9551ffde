"""Make memory that comes uninitialized come with zeros."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from tfmq_fx._torch.operators import schema_of
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.memory import memory_of, written_memory

__all__ = ["FillUninitialized"]

aten = torch.ops.aten

#: What takes the same arguments, but for a memory format, and gives zeros.
ZEROS = {
    aten.empty_like.default: aten.zeros_like.default,
    aten.empty.memory_format: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
}


class FillUninitialized(GraphPass):
    """Replace an operator that returns uninitialized memory by the one that returns zeros.

    Before::

        %e = empty_like(%x)
        %y = slice_scatter(%e, %z, 1, 0, 2)

    After::

        %e = zeros_like(%x)
        %y = slice_scatter(%e, %z, 1, 0, 2)

    Legality: nothing writes into the memory; where something does, two equal tensors of zeros could be taken for one.
    Numerics are preserved to the bit: what a model reads of such memory before it writes there is not determined.
    Meta: no node is inserted; the values have the same shape and dtype.
    """

    id: ClassVar[str] = "tfmq::fill_uninitialized"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace all calls that nobody writes to."""
        written = written_memory(graph_module.graph)
        modified = False
        for node in graph_module.graph.nodes:
            zeros = ZEROS.get(node.target) if node.op == "call_function" else None
            if zeros is None or memory_of(node) & written:
                continue
            taken = {argument.name for argument in schema_of(zeros).arguments}
            node.kwargs = {name: value for name, value in node.kwargs.items() if name in taken}
            node.target = zeros
            modified = True
        return modified
