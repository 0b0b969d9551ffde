"""Remove casts that change neither dtype, device nor layout."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.nodes import replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["RemoveNoopCasts"]

aten = torch.ops.aten

CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    torch.ops.prims.convert_element_type.default,
)


def is_noop_cast(node: Any) -> bool:
    """Whether ``node`` is a cast, alias or ``contiguous`` whose output is its input in every respect."""
    if not is_call(node, *CASTS):
        return False
    source = node.args[0]
    before, after = (node_value(source) if isinstance(source, fx.Node) else None), node_value(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and before.layout == after.layout
        and before.stride() == after.stride()
    )


class RemoveNoopCasts(GraphPass):
    """Erase casts, aliases and ``contiguous`` calls that return their input unchanged.

    Before::

        %c = to(%x, float32)      %y = silu(%c)        # %x is float32 already

    After::

        %y = silu(%x)

    Legality: dtype, device, layout and strides of input and output are equal, so the values are the
    same; the graph is functional, so a copy cannot be told from its source. Numerics are preserved to
    the bit.
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::remove_noop_casts"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Bypass every cast to what its input already is."""
        idle = [node for node in graph_module.graph.nodes if is_noop_cast(node)]
        for node in idle:
            replace_node(node, node.args[0])
        return bool(idle)
