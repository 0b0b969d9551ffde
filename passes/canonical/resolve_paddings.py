"""Write the paddings of convolutions as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import argument_of, insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["ResolvePaddings", "named_padding"]

aten = torch.ops.aten

#: What a convolution whose padding has a name becomes.
NUMERIC: dict[Any, Callable[..., Any]] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def named_padding(node: Any) -> list[tuple[int, int]] | None:
    """How many zeros a padding by name adds before and behind each axis of the image; None for any other node."""
    if not is_call(node, *NUMERIC) or not isinstance(weight := node_value(argument_node(node, 1)), Tensor):
        return None
    kernel = [int(size) for size in weight.shape[2:]]
    if argument_of(node, 4, "padding", "valid") == "valid":
        return [(0, 0)] * len(kernel)
    dilation = _per_axis(argument_of(node, 5, "dilation", 1), len(kernel))
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * axes if len(numbers) == 1 else numbers


class ResolvePaddings(GraphPass):
    """Replace the padding ``"same"`` or ``"valid"`` of a convolution by numbers.

    Before::

        %y = conv2d(%x, %w, %b, [1, 1], "same")                                    # %w: [O, C, 3, 4]

    After::

        %p = pad(%x, [0, 1, 0, 0])      %y = conv2d(%p, %w, %b, [1, 1], [1, 1])

    Legality: ``"valid"`` adds nothing, ``"same"`` dilation * (kernel - 1) zeros to an axis, the odd one behind it, as
    torch does before it calls the same convolution. Numerics are preserved to the bit.
    Why: later passes and integer kernels read the padding as numbers.
    Meta: the new nodes take the module stack of the convolution.
    """

    id: ClassVar[str] = "tfmq::resolve_paddings"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Resolve every padding by name."""
        candidates = [(node, named_padding(node)) for node in graph_module.graph.nodes]
        named = [(node, padding) for node, padding in candidates if padding is not None]
        for node, padding in named:
            _resolve(graph_module.graph, node, padding)
        return bool(named)


def _resolve(graph: fx.Graph, node: fx.Node, padding: list[tuple[int, int]]) -> None:
    image, weight, bias = node.args[0], node.args[1], argument_of(node, 2, "bias", None)
    sizes = {3: ("stride", 1), 5: ("dilation", 1)}
    stride, dilation = (_per_axis(argument_of(node, n, *sizes[n]), len(padding)) for n in (3, 5))
    groups = argument_of(node, 6, "groups", 1)
    uneven = [behind - before for before, behind in padding]
    with graph.inserting_before(node):
        if any(uneven):
            # ``pad`` begins with the last axis.
            border = [size for extra in reversed(uneven) for size in (0, extra)]
            image = insert_call(graph, aten.pad.default, (image, border), anchor=node)
        args = (image, weight, bias, stride, [before for before, _ in padding], dilation, groups)
        new = insert_call(graph, NUMERIC[node.target], args, anchor=node)
    replace_node(node, new)
