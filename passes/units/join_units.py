"""Put the nodes of partitioned units back into the graph."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_getitem
from tfmq_fx.passes.support.subgraphs import SIZE_OF
from tfmq_fx.passes.units.partition_units import UNIT

__all__ = ["JoinUnits"]


class JoinUnits(GraphPass):
    """Put the nodes of every unit in the place of its call: the inverse of ``PartitionUnits``.

    Before::

        %u = unit_3(%x)      %y = getitem(%u, 0)      %c = getitem(%u, 1)      return cat([%y, %c])

    After::

        %h = group_norm(%x, …)      %c = conv2d(%h, %w, %b)      %y = add(%x, %c)      return cat([%y, %c])

    Legality: a call computes what its nodes compute; numerics are preserved to the bit. The nodes have their
    old names where these are free, and read the attributes that they read before; what was put into a unit
    under such a name (a trained weight, another observer) takes its place in the outer module. A size that
    was recomputed inside the unit is read where it was before, when that node is still there.
    Meta: that of the nodes inside the units.
    """

    id: ClassVar[str] = "tfmq::join_units"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Several outputs are picked one by one, and no two readers of a name hold different things under it."""
        super().requires(graph_module)
        calls = _unit_calls(graph_module)
        for call in calls:
            several = isinstance(_unit(graph_module, call).graph.output_node().args[0], (tuple, list))
            if several and not all(is_getitem(user) for user in call.users):
                msg = (
                    f"{self.id}: the outputs of {call.name!r} ({call.meta[UNIT][0]}) are read all at once; "
                    "pick them with operator.getitem"
                )
                raise PassError(msg)
        for name, held in _replaced_attributes(graph_module, calls).items():
            if any(not _same_value(value, held[0]) for value in held[1:]):
                msg = f"{self.id}: units hold different values under the name {name!r}; give them one before joining"
                raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Inline each unit, then drop it."""
        calls = _unit_calls(graph_module)
        for name, held in _replaced_attributes(graph_module, calls).items():
            _write_attribute(graph_module, name, held[0])
        units = {str(call.target) for call in calls}
        for call in calls:
            _inline(graph_module, call)
        for name in units:
            graph_module.delete_submodule(name)
        return bool(calls)


def _unit_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "call_module" and UNIT in node.meta]


def _unit(graph_module: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    unit = graph_module.get_submodule(str(call.target))
    assert isinstance(unit, fx.GraphModule)
    return unit


def _inline(graph_module: fx.GraphModule, call: fx.Node) -> None:
    graph, unit = graph_module.graph, _unit(graph_module, call)
    present = {node.name: node for node in graph.nodes}
    arguments = iter(call.args)
    copies: dict[fx.Node, Any] = {}
    with graph.inserting_before(call):
        for node in unit.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(arguments)
            elif (size := _size_outside(node, present)) is not None:
                copies[node] = size
            elif node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta.pop(SIZE_OF, None)
                if node.name not in present:
                    copies[node].name = node.name
                present[copies[node].name] = copies[node]
    returned = unit.graph.output_node().args[0]
    if isinstance(returned, (tuple, list)):
        for user in list(call.users):
            index: Any = user.args[1]
            result: Any = returned[index]
            user.replace_all_uses_with(copies[result])
            graph.erase_node(user)
    else:
        result = returned
        call.replace_all_uses_with(copies[result])
    graph.erase_node(call)


def _size_outside(node: fx.Node, present: dict[str, fx.Node]) -> fx.Node | None:
    """The outer node that a size inside a unit stands for, if it is still what it was."""
    outside = present.get(node.meta.get(SIZE_OF, ""))
    same = outside is not None and str(outside.meta.get("val")) == str(node.meta.get("val"))
    return outside if same else None


# -- state -------------------------------------------------------------------------------------------------------


def _attributes_read(owner: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    names = {str(n.target) for n in graph.nodes if n.op == "get_attr" or (n.op == "call_module" and UNIT not in n.meta)}
    return {name: read_attribute(owner, name) for name in sorted(names)}


def _replaced_attributes(graph_module: fx.GraphModule, calls: list[fx.Node]) -> dict[str, list[Any]]:
    """What the readers of each name hold under it, where some unit holds another thing than the outer module."""
    readers = [_attributes_read(_unit(graph_module, call), _unit(graph_module, call).graph) for call in calls]
    readers.append(_attributes_read(graph_module, graph_module.graph))
    replaced: dict[str, list[Any]] = {}
    for held in readers[:-1]:
        for name, value in held.items():
            try:
                same = read_attribute(graph_module, name) is value
            except AttributeError:
                same = False
            if not same:
                replaced[name] = [value, *(other[name] for other in readers if name in other)]
    return replaced


def _same_value(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        same = value.dtype == other.dtype and value.device == other.device and value.shape == other.shape
        return value is other or (same and torch.equal(value, other))
    return value is other


def _write_attribute(root: nn.Module, name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)
