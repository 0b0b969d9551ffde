"""Let a graph that was captured with integer timesteps take fractional ones."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics, PassError
from tfmq_fx.passes.support.arguments import called_operator
from tfmq_fx.passes.support.nodes import compute_value, fake_mode_of
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.timestep_row import ROW_OP

__all__ = ["WidenTimesteps", "integer_reader"]

aten = torch.ops.aten

#: What computes the same number from a float as from the integer, whole timesteps given.
CARRIERS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.expand.default,
    aten.expand_as.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.ones_like.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.neg.default,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.sin.default,
    aten.cos.default,
    aten.exp.default,
    aten.log.default,
    aten.sqrt.default,
)
#: What has nothing to do with the dtype: sizes, and the lookup, which takes any.
UNTOUCHED = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, ROW_OP)


def _placeholder(graph: fx.Graph, timestep: str) -> fx.Node | None:
    return next((n for n in graph.nodes if n.op == "placeholder" and n.target == timestep), None)


def _widened(graph: fx.Graph, timestep: str) -> tuple[dict[fx.Node, Any], fx.Node | None]:
    """The values that nodes have with a float32 timestep, and the first node that wants an integer, if any.

    The values stop where the graph turns timesteps into floats by itself: from there on nothing changes.
    """
    placeholder = _placeholder(graph, timestep)
    value = None if placeholder is None else node_value(placeholder)
    if placeholder is None or not isinstance(value, Tensor) or value.is_floating_point():
        return {}, None
    mode = fake_mode_of(graph)
    with mode:
        widened: dict[fx.Node, Any] = {placeholder: value.to(torch.float32)}
    for node in graph.nodes:
        old = node_value(node)
        if is_call(node, *UNTOUCHED) or not any(n in widened for n in node.all_input_nodes):
            continue
        if not is_call(node, *CARRIERS):
            return {}, node
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: widened.get(n, node_value(n)))
        new = compute_value(mode, called_operator(node), args, kwargs)
        if not new.is_floating_point() or (old.is_floating_point() and old.dtype != new.dtype):
            return {}, node
        if new.dtype != old.dtype:
            widened[node] = new
    return widened, None


def integer_reader(graph_module: fx.GraphModule, timestep: str = "timestep") -> fx.Node | None:
    """The node that wants timesteps to be integers; None where float ones mean the same, or are what it takes."""
    return _widened(graph_module.graph, timestep)[1]


class WidenTimesteps(GraphPass):
    """Make the timestep an input of float32, where the graph only ever reads it as a float.

    Before::

        %timestep = placeholder                    # int64 [N]
        %t = to(mul(%timestep, %ones), float32)

    After::

        %timestep = placeholder                    # float32 [N]
        the same graph, which casts nothing any more

    Legality: on the way to the first float stand only operators that compute the same number from a float as from the
    integer, and float32 holds every integer up to 2**24: whole timesteps give what they gave, to the bit. A graph that
    casts timesteps to integers, indexes with them or divides them as integers is refused by ``requires``.
    Meta: the values of the placeholder and of the nodes up to the first float.

    Args:
        timestep: Name of the timestep placeholder.
    """

    id: ClassVar[str] = "tfmq::widen_timesteps"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def __init__(self, *, timestep: str = "timestep") -> None:
        super().__init__()
        self.timestep = timestep

    def requires(self, graph_module: fx.GraphModule) -> None:
        """No node that wants an integer."""
        super().requires(graph_module)
        node = integer_reader(graph_module, self.timestep)
        if node is not None:
            msg = (
                f"{self.id}: node {node.name!r} ({node.target}) takes {self.timestep!r} as an integer; "
                "capture the model with a float timestep"
            )
            raise PassError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Set the values."""
        widened, _ = _widened(graph_module.graph, self.timestep)
        for node, value in widened.items():
            node.meta["val"] = value
        return bool(widened)
