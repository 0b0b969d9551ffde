"""Take a product of two thin factors out of a layer's weight: it runs beside what is left, on the input as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import (
    add_buffer,
    erase_unread_attribute,
    insert_call,
    insert_get_attr,
    insert_module_call,
    read_attribute,
    replace_node,
)
from tfmq_fx.passes.support.predicates import is_call, is_conv, node_value

__all__ = ["AddLowRankBranches", "LowRankFactors", "branch_input", "branched_weight", "is_branch"]

aten = torch.ops.aten
#: Where the groups of a convolution stand among its arguments, and what they are when left out.
GROUPS = {aten.conv1d.default: 6, aten.conv2d.default: 6, aten.conv3d.default: 6, aten.convolution.default: 8}
#: How the buffers end that hold the two factors, and what is left of the weight.
DOWN, UP, RESIDUAL = "_low_rank_down", "_low_rank_up", "_low_rank_residual"


@dataclass(frozen=True, eq=False)
class LowRankFactors:
    """A part of a weight of rank ``r``: ``up @ down``, with the axes of the weight flattened from the second on.

    Attributes:
        down: ``[r, C]`` of a linear, ``[r, C, *kernel]`` of a convolution.
        up: ``[K, r]``.
    """

    down: Tensor
    up: Tensor

    def product(self) -> Tensor:
        """The part, in the shape of the weight."""
        return (self.up @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


def branched_weight(layer: fx.Node) -> fx.Node | None:
    """The node of the stored weight of a layer that can have a branch; None for another layer.

    That is a linear or an ungrouped convolution whose weight nothing else reads, past the weight's own observer.
    """
    if not (is_conv(layer) or is_call(layer, aten.linear.default)) or layer.kwargs or len(layer.args) < 2:
        return None
    if is_conv(layer) and _groups(layer) != 1:
        return None
    weight = layer.args[1]
    while isinstance(weight, fx.Node) and weight.op == "call_module" and len(weight.users) == 1:
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) != 1:
        return None
    reads = [node for node in layer.graph.find_nodes(op="get_attr") if node.target == weight.target]
    return weight if len(reads) == 1 and not str(weight.target).endswith((DOWN, UP, RESIDUAL)) else None


def is_branch(layer: fx.Node) -> bool:
    """Whether ``layer`` is one of the two of a branch, at any stage: the names of its buffers say so."""
    source = layer.args[1] if len(layer.args) > 1 else None
    while isinstance(source, fx.Node) and source.op != "get_attr" and source.args:
        source = source.args[0]
    return isinstance(source, fx.Node) and any(suffix in str(source.target) for suffix in (DOWN, UP))


def branch_input(layer: fx.Node) -> fx.Node:
    """What a branch beside a layer reads: the layer's input before the observer that stands before it."""
    source = argument_node(layer, 0)
    return argument_node(source, 0) if source.op == "call_module" else source


def _groups(conv: fx.Node) -> Any:
    target: Any = conv.target
    position = GROUPS[target]
    return conv.args[position] if position < len(conv.args) else 1


class AddLowRankBranches(GraphPass):
    """Give layers a branch of low rank, which reads their input unquantized, and keep the rest of the weight in them.

    Before::

        %o = observer_0(%x)      %y = conv2d(%o, weight_observer(%w), %b, stride, padding)

    After, with ``w = residual + up @ down``::

        %o = observer_0(%x)      %m = conv2d(%o, weight_observer(%residual), %b, stride, padding)
        %d = conv2d(%x, observer_1(%down), None, stride, padding)      %u = conv2d(%d, observer_2(%up))
        %y = add(%m, %u)

    A linear has two linears beside it.

    Legality: a layer is linear in its weight, and a convolution of a product is a convolution by ``down`` with the
    layer's geometry and one of single positions by ``up``. Layers as :func:`branched_weight` takes them; each gets a
    branch once. Observers return their input, so numerics are preserved up to the order of float sums.
    Source: SVDQuant (ICLR 2025, arXiv 2411.05007), equation 5.
    Meta: the new nodes take the module stack of the layer; the buffers are named after its weight, which is gone.

    Args:
        factors: By the target of a weight, the part of it that goes to the branch.
        make_observer: Called with the layer; makes what observes a factor of its branch.

    Raises:
        ValueError: Factors do not have the shape of their weight.
    """

    id: ClassVar[str] = "tfmq::add_low_rank_branches"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def __init__(self, factors: Mapping[str, LowRankFactors], make_observer: Callable[[fx.Node], nn.Module]) -> None:
        super().__init__()
        self.factors, self.make_observer = dict(factors), make_observer

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Give a branch to each layer whose weight is named."""
        found = [(layer, branched_weight(layer)) for layer in graph_module.graph.nodes]
        named = [(layer, weight) for layer, weight in found if weight is not None and weight.target in self.factors]
        for _, weight in named:
            self._check(weight)
        for layer, weight in named:
            self._add(graph_module, layer, weight)
        return bool(named)

    def _check(self, weight: fx.Node) -> None:
        factors = self.factors[str(weight.target)]
        expected, rank = node_value(weight).shape, len(factors.down)
        if factors.up.shape != (expected[0], rank) or factors.down.shape[1:] != expected[1:]:
            shapes = f"{list(factors.up.shape)} and {list(factors.down.shape)}"
            msg = f"{self.id}: factors of {shapes} do not make up {weight.target!r} of {list(expected)}"
            raise ValueError(msg)

    def _add(self, graph_module: fx.GraphModule, layer: fx.Node, weight: fx.Node) -> None:
        graph, name, target = graph_module.graph, str(weight.target), layer.target
        assert callable(target)
        factors, values = self.factors[name], read_attribute(graph_module, name).detach()
        residual = add_buffer(graph_module, f"{name}{RESIDUAL}", (values - factors.product()).to(values.dtype))
        with graph.inserting_before(weight):
            rest = insert_get_attr(graph_module, residual, anchor=layer)
        weight.replace_all_uses_with(rest)
        erase_unread_attribute(graph_module, weight)
        spatial = node_value(layer).ndim - 2 if is_conv(layer) else 0
        up = factors.up.reshape(*factors.up.shape, *[1] * spatial).to(values.dtype)
        geometry = (None, *layer.args[3:]) if is_conv(layer) else ()
        single: tuple[Any, ...] = ()
        if is_call(layer, aten.convolution.default):
            ones, zeros = [1] * spatial, [0] * spatial
            single = (None, ones, zeros, ones, False, zeros, 1)
        with graph.inserting_before(layer):
            main = insert_call(graph, target, layer.args, anchor=layer)
            down = self._observed(graph_module, layer, f"{name}{DOWN}", factors.down.to(values.dtype))
            inner = insert_call(graph, target, (branch_input(layer), down, *geometry), anchor=layer)
            outer = self._observed(graph_module, layer, f"{name}{UP}", up)
            branch = insert_call(graph, target, (inner, outer, *single), anchor=layer)
            total = insert_call(graph, aten.add.Tensor, (main, branch), anchor=layer)
        replace_node(layer, total)

    def _observed(self, graph_module: fx.GraphModule, layer: fx.Node, name: str, values: Tensor) -> fx.Node:
        """The read of a factor, through an observer of its own."""
        read = insert_get_attr(graph_module, add_buffer(graph_module, name, values), anchor=layer)
        observer, number = "low_rank_observer_0", 0
        while hasattr(graph_module, observer):
            number += 1
            observer = f"low_rank_observer_{number}"
        graph_module.add_submodule(observer, self.make_observer(layer))
        return insert_module_call(layer.graph, observer, (read,), anchor=layer)
