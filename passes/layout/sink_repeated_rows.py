"""Repeat the rows of the time path as late as possible."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value, repeats_rows

__all__ = ["SinkRepeatedRows"]

aten = torch.ops.aten

#: Operators on one tensor that compute every element from itself alone.
POINTWISE = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default,
             aten.mish.default, aten.to.dtype, aten.clone.default)  # fmt: skip


def _is_rowwise(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` computes each row of its result from the same row of ``source``, and reads it once."""
    linear = is_call(node, aten.linear.default) and node_value(source).ndim > 1
    if not (linear or is_call(node, *POINTWISE)):
        return False
    return node.args[0] is source and source not in node.args[1:]


def _swap_with_user(repetition: fx.Node, user: fx.Node) -> fx.Node:
    """Insert ``repetition(user(source))`` in front of ``user``, which computes ``user(repetition(source))``."""
    graph, (source, *times) = user.graph, repetition.args
    operator: Any = user.target
    again: Any = repetition.target
    with graph.inserting_before(user):
        first = insert_call(graph, operator, (source, *user.args[1:]), kwargs=dict(user.kwargs), anchor=user)
        return insert_call(graph, again, (first, *times), kwargs=dict(repetition.kwargs), anchor=user)


class SinkRepeatedRows(GraphPass):
    """Move a repetition of rows in the temporal block behind the activations and linears that follow it.

    Before::

        %r = repeat_interleave(%emb, 3, 0)      %s = silu(%r)      %y = linear(%s, %w, %b)       # [3N, C]

    After::

        %s = silu(%emb)      %y = linear(%s, %w, %b)      %r = repeat_interleave(%y, 3, 0)       # [N, C], [3N, C]

    Legality: activations and linears work on each row by itself, so they may come before rows are repeated.
    Numerics are preserved up to the number of rows' effect on the order of float sums.
    Why: video models repeat the time embed once a frame. Repeated last, every layer of the block has one row
    an item of the batch, so it is observed, reconstructed and tabulated as in any other model; it is also less work.
    Meta: moved calls and the repetitions behind them take the module stack of the call that they replace.

    Args:
        timestep: Name of the timestep placeholder.
    """

    id: ClassVar[str] = "tfmq::sink_repeated_rows"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def __init__(self, *, timestep: str = "timestep") -> None:
        super().__init__()
        self.timestep = timestep

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Move every repetition over one user after the other, until none can be passed."""
        block = find_temporal_block(graph_module, self.timestep)
        waiting = [node for node in block.nodes if repeats_rows(node)]
        modified = False
        while waiting:
            repetition = waiting.pop()
            for user in list(repetition.users):
                if _is_rowwise(user, repetition):
                    waiting.append(_swap_with_user(repetition, user))
                    replace_node(user, waiting[-1])
                    modified = True
            if not repetition.users:
                graph_module.graph.erase_node(repetition)
        return modified
