"""Observe activations by the timestep group of each item of the batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import SymInt, Tensor, fx, nn

from tfmq_fx.passes.analysis.batch_axis import batch_axes, size_ratio
from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.nodes import insert_call, insert_module_call
from tfmq_fx.passes.support.predicates import fqn, is_conv, is_linear, is_matmul, node_value
from tfmq_fx.passes.temporal.group_timesteps import GROUPS, find_groups

__all__ = ["ObserveTimestepGroups", "activation_arguments", "ungrouped_layers"]

aten = torch.ops.aten

#: ``meta`` key of a graph: layer -> why (one of) its activations could not be grouped.
UNGROUPED = "tfmq_fx.ungrouped"
NOT_FIRST = "the items of the batch do not lie one behind the other along the first axis of its input"


def ungrouped_layers(graph_module: fx.GraphModule) -> dict[str, str]:
    """The layers that :class:`ObserveTimestepGroups` could not observe by group, with the reason for each."""
    return dict(graph_module.meta.get(UNGROUPED, {}))


def activation_arguments(node: fx.Node) -> tuple[int, ...]:
    """The positions of a layer's activations among its arguments; ``()`` when it is no layer."""
    if is_matmul(node):
        return (0, 1)
    if node.target is aten.addmm.default:
        return (1,)
    return (0,) if is_conv(node) or is_linear(node) else ()


class ObserveTimestepGroups(GraphPass):
    """Insert ``observer(x, groups)`` before layers.

    Before::

        %y = conv2d(%x, %w, %b)                                          # %x: [N, C, H, W]

    After::

        %o = grouped_observer_0(%x, %groups)      %y = conv2d(%o, %w, %b)

    Legality: an observer returns its input, so numerics are preserved until the graph is converted. ``groups`` has
    one entry per index of the input's first axis. Where that axis holds ``k`` entries per item of the batch
    (``[N * L, C]``), each item's group is repeated ``k`` times; where items are not known to lie one behind the
    other along it, the activation is left alone and :func:`ungrouped_layers` tells so.
    Activations with equal keys share an observer. A layer that is observed already is left alone.
    Meta: the new nodes take the module stack of the layer.

    Args:
        make_observer: Called as ``make_observer(layer, entries)``; makes a module called as ``observer(x, groups)`` for
            the layer that it stands before, whose input has so many entries per item along its first axis (1 where that
            is not known).
        select: Called as ``select(layer, activation)``: whether to observe it.
        key: Activations are shared by layers of one key; by default by all.
        groups: The buffer that the groups are read from (:class:`~.group_timesteps.GroupTimesteps`).
    """

    id: ClassVar[str] = "tfmq::observe_timestep_groups"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(
        self,
        make_observer: Callable[[fx.Node, int], nn.Module],
        *,
        select: Callable[[fx.Node, fx.Node], bool] = lambda layer, activation: True,
        key: Callable[[fx.Node], Hashable] = lambda layer: None,
        groups: str = GROUPS,
    ) -> None:
        super().__init__()
        self.make_observer, self.select, self.key, self.groups = make_observer, select, key, groups

    def requires(self, graph_module: fx.GraphModule) -> None:
        """The timestep groups of the batch."""
        super().requires(graph_module)
        self._groups(graph_module)

    def _groups(self, graph_module: fx.GraphModule) -> fx.Node:
        groups = find_groups(graph_module, self.groups)
        if groups is None:
            msg = f"{self.id}: the graph has no timestep groups; run GroupTimesteps first"
            raise PassError(msg)
        return groups

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Observe each selected activation once per key."""
        groups = self._groups(graph_module)
        batch = node_value(groups).shape[0]
        one_group = isinstance(batch, int) and batch == 1
        axes = {} if one_group else batch_axes(graph_module, batch)
        places = [
            (layer, position, layer.args[position])
            for layer in graph_module.graph.nodes
            for position in activation_arguments(layer)
            if isinstance(layer.args[position], fx.Node)
            and layer.args[position].op != "call_module"
            and self.select(layer, layer.args[position])
        ]
        observed: dict[Any, fx.Node] = {}
        ungrouped: dict[str, str] = {}
        for layer, position, source in places:
            value = node_value(source)
            if not (one_group or axes.get(source) == 0) or value.ndim < 2:
                ungrouped[fqn(layer)] = NOT_FIRST
                continue
            site = (source, self.key(layer))
            if site not in observed:
                ratio = value.shape[0] if one_group else size_ratio(value.shape[0], batch)
                observer = self.make_observer(layer, ratio if isinstance(ratio, int) else 1)
                name = _register(graph_module, observer)
                with graph_module.graph.inserting_before(layer):
                    entries = _entries(graph_module.graph, groups, source, value, batch, layer)
                    observed[site] = insert_module_call(graph_module.graph, name, (source, entries), anchor=layer)
            layer.update_arg(position, observed[site])
        if ungrouped:
            graph_module.meta[UNGROUPED] = {**ungrouped_layers(graph_module), **ungrouped}
        return bool(observed)


def _entries(
    graph: fx.Graph, groups: fx.Node, source: fx.Node, value: Tensor, batch: int | SymInt, layer: fx.Node
) -> fx.Node:
    """Insert the group of every index of the first axis of ``value``."""

    def size(node: fx.Node, value: int | SymInt) -> Any:
        return value if isinstance(value, int) else insert_call(graph, aten.sym_size.int, (node, 0), anchor=layer)

    if isinstance(batch, int) and batch == 1:
        return insert_call(graph, aten.expand.default, (groups, [size(source, value.shape[0])]), anchor=layer)
    ratio: Any = size_ratio(value.shape[0], batch)
    if ratio == 1:
        return groups
    if not isinstance(ratio, int):
        sizes = (size(source, value.shape[0]), size(groups, batch))
        ratio = insert_call(graph, operator.floordiv, sizes, anchor=layer)
    column = insert_call(graph, aten.unsqueeze.default, (groups, 1), anchor=layer)
    repeated = insert_call(graph, aten.expand.default, (column, [-1, ratio]), anchor=layer)
    return insert_call(graph, aten.reshape.default, (repeated, [-1]), anchor=layer)


def _register(graph_module: fx.GraphModule, observer: nn.Module) -> str:
    count = 0
    while hasattr(graph_module, f"grouped_observer_{count}"):
        count += 1
    name = f"grouped_observer_{count}"
    graph_module.add_submodule(name, observer)
    return name
