"""Quantize a whole batch with the parameters of one timestep group."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from .base import GraphPass
from .group_timesteps import find_groups
from .nodes import insert_call, replace_node
from .predicates import is_call

__all__ = ["UseOneTimestepGroup", "find_grouped_quantizers"]

aten = torch.ops.aten
#: What stands between the groups of the batch and the index of one activation's parameters.
REPEATS = (aten.expand.default, aten.unsqueeze.default, aten.reshape.default)


def find_grouped_quantizers(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The quantize nodes whose parameters are gathered by the timestep group of each item."""
    groups = find_groups(graph_module)
    if groups is None:
        return []
    quantize = torch.ops.quantized_decomposed.quantize_per_channel.default
    return [n for n in graph_module.graph.nodes if is_call(n, quantize) and _gathered_by(n.args[1], groups)]


def _gathered_by(parameter: Any, groups: fx.Node) -> bool:
    if not is_call(parameter, aten.index_select.default):
        return False
    index = parameter.args[2]
    while is_call(index, *REPEATS):
        index = index.args[0]
    return index is groups


class UseOneTimestepGroup(GraphPass):
    """Quantize with the first item's timestep group in the place of every item's own.

    Before::

        %s = index_select(%scales, 0, %groups)      %z = index_select(%zero_points, 0, %groups)      # [N]
        %q = quantize_per_channel(%x, %s, %z, 0, …)      %y = dequantize_per_channel(%q, %s, %z, 0, …)

    After::

        %first = slice(%groups, 0, 0, 1)
        %s = index_select(%scales, 0, %first)      %z = index_select(%zero_points, 0, %first)        # [1]
        %q = to(clamp(add(round(mul(%x, reciprocal(%s))), %z), …), uint8)
        %y = dequantize_per_tensor.tensor(%q, %s, %z, …)

    Legality: the caller promises that all items of a batch are of one group, as in sampling, where a step has one
    timestep (the lowered denoiser splits batches that mix groups); then numerics are preserved. Why: an integer
    kernel takes one scale and zero point for its whole input. Quantizing is written out, because the lowering of
    ``quantize_per_tensor.tensor`` in torch 2.13 does not clamp on CPUs: what leaves the range comes back at its other
    end. Each reader gets a dequantize of its own, as the compilers' patterns expect. A graph without timestep
    groups is left alone.
    Meta: the new nodes take the module stack of those that they replace.
    """

    id: ClassVar[str] = "tfmq::use_one_timestep_group"

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every pair of quantize and dequantize by timestep group."""
        quantizers = find_grouped_quantizers(graph_module)
        if not quantizers:
            return False
        graph, groups = graph_module.graph, find_groups(graph_module)
        assert groups is not None
        decomposed = torch.ops.quantized_decomposed
        with graph.inserting_before(groups.next):
            first = insert_call(graph, aten.slice.Tensor, (groups, 0, 0, 1), anchor=quantizers[0])
        for old in quantizers:
            x, scales, zero_points, _, low, high, dtype = old.args
            with graph.inserting_before(old):
                scale, zero = (
                    insert_call(graph, aten.index_select.default, (gather.args[0], 0, first), anchor=old)  # type: ignore[union-attr]
                    for gather in (scales, zero_points)
                )
                inverse = insert_call(graph, aten.reciprocal.default, (scale,), anchor=old)
                ratio = insert_call(graph, aten.mul.Tensor, (x, inverse), anchor=old)
                rounded = insert_call(graph, aten.round.default, (ratio,), anchor=old)
                shifted = insert_call(graph, aten.add.Tensor, (rounded, zero), anchor=old)
                clamped = insert_call(graph, aten.clamp.default, (shifted, low, high), anchor=old)
                new = insert_call(graph, aten.to.dtype, (clamped, dtype), anchor=old)
            for restored in list(old.users):
                for reader in list(restored.users):
                    with graph.inserting_before(reader):
                        own = insert_call(
                            graph,
                            decomposed.dequantize_per_tensor.tensor,
                            (new, scale, zero, low, high, dtype),
                            anchor=restored,
                        )
                    reader.replace_input_with(restored, own)
                graph.erase_node(restored)
            replace_node(old, new)
        graph.eliminate_dead_code()
        return True
