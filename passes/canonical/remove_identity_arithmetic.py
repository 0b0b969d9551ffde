"""Remove multiplications and divisions by one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.memory import memory_of, written_memory
from tfmq_fx.passes.support.nodes import replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["RemoveIdentityArithmetic"]

aten = torch.ops.aten

#: The neutral Python number of the second operand.
NEUTRAL: dict[Any, float] = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
}


def is_identity_arithmetic(node: Any) -> bool:
    """Whether ``node`` multiplies or divides by the Python number one without changing the dtype."""
    if not is_call(node, *NEUTRAL):
        return False
    tensor, number = node.args[0], node.args[1]
    if not isinstance(tensor, fx.Node) or isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    before, after = node_value(tensor), node_value(node)
    return (
        number == NEUTRAL[node.target]
        and isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.stride() == after.stride()
    )


class RemoveIdentityArithmetic(GraphPass):
    """Erase ``x * 1`` and ``x / 1``.

    Before::

        %r = div(%h, 1.0)      %y = group_norm(%r, ...)        # diffusers' output_scale_factor

    After::

        %y = group_norm(%h, ...)

    Legality: IEEE multiplication and division by one return the operand; integer division by one
    promotes to float and is therefore left alone (dtypes must agree). ``x + 0`` is left alone too: it
    turns ``-0.0`` into ``0.0``. Nothing writes into the memory of either value: the product has its
    own. Numerics are preserved to the bit.
    Meta: no node is inserted.
    """

    id: ClassVar[str] = "tfmq::remove_identity_arithmetic"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Bypass every identity."""
        written, modified = written_memory(graph_module.graph), False
        for node in graph_module.graph.nodes:
            if is_identity_arithmetic(node) and not (memory_of(node) | memory_of(node.args[0])) & written:
                replace_node(node, node.args[0])
                modified = True
        return modified
