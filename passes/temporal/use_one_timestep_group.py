"""Quantize a whole batch with the parameters of one timestep group."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.item_columns import REPEATS
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups

__all__ = ["UseOneTimestepGroup", "find_grouped_quantizers"]

aten = torch.ops.aten


def find_grouped_quantizers(
    graph_module: fx.GraphModule, names: Collection[str] = (GROUPS, EACH_TIMESTEP)
) -> list[fx.Node]:
    """The quantize nodes whose parameters are gathered by the timestep group of each item.

    Args:
        graph_module: A converted graph.
        names: The buffers that the groups may be read from.
    """
    groups = {find_groups(graph_module, name) for name in names}
    quantize = decomposed.quantize_per_channel.default
    return [n for n in graph_module.graph.nodes if is_call(n, quantize) and _groups_of(n.args[1]) in groups - {None}]


def _groups_of(parameter: Any) -> Any:
    """The groups that a gathered scale or zero point is indexed by; None for another one."""
    if not is_call(parameter, aten.index_select.default):
        return None
    index = parameter.args[2]
    while is_call(index, *REPEATS):
        index = index.args[0]
    return index


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
    timestep (the lowered denoiser splits batches that mix groups); then numerics are preserved to the bit. Each
    buffer of groups has a first item of its own. Why: an integer kernel takes one scale and zero point for its whole
    input. Quantizing is written out, because the lowering of ``quantize_per_tensor.tensor`` in torch 2.13 does not
    clamp on CPUs: what leaves the range comes back at its other end. Each reader gets a dequantize of its own, as the
    compilers' patterns expect. A graph without timestep groups is left alone.
    Meta: the new nodes take the module stack of those that they replace.
    """

    id: ClassVar[str] = "tfmq::use_one_timestep_group"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every pair of quantize and dequantize by timestep group."""
        quantizers = find_grouped_quantizers(graph_module)
        if not quantizers:
            return False
        graph = graph_module.graph
        firsts: dict[fx.Node, fx.Node] = {}
        for old in quantizers:
            x, _, _, _, low, high, dtype = old.args
            scales, zero_points = argument_node(old, 1), argument_node(old, 2)
            groups = _groups_of(scales)
            if groups not in firsts:
                following = groups.next
                while following.op == "placeholder":
                    following = following.next
                with graph.inserting_before(following):
                    firsts[groups] = insert_call(graph, aten.slice.Tensor, (groups, 0, 0, 1), anchor=old)
            first = firsts[groups]
            with graph.inserting_before(old):
                scale, zero = (
                    insert_call(graph, aten.index_select.default, (gather.args[0], 0, first), anchor=old)
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
                        dequantized = insert_call(
                            graph,
                            decomposed.dequantize_per_tensor.tensor,
                            (new, scale, zero, low, high, dtype),
                            anchor=restored,
                        )
                    reader.replace_input_with(restored, dequantized)
                graph.erase_node(restored)
            replace_node(old, new)
        graph.eliminate_dead_code()
        return True
