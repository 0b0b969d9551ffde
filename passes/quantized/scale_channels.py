"""Give the channels of an observed activation one range: scale them, and the weights that read them inversely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import (
    add_buffer,
    erase_unread_attribute,
    insert_call,
    insert_get_attr,
    read_attribute,
)
from tfmq_fx.passes.support.predicates import is_call, is_conv, is_linear, node_value

__all__ = ["ScaleChannels", "channel_axis", "inverse_factors", "scalable_weights"]

aten = torch.ops.aten
#: Convolutions read channels along this axis; linears along the last.
IMAGE_CHANNELS = 1
#: How the buffers end that activations are multiplied by.
INVERSE = "_inverse_factors"


def channel_axis(layer: fx.Node) -> int:
    """The axis of the input channels of a layer's activation."""
    return IMAGE_CHANNELS if is_conv(layer) else -1


def scalable_weights(observer: fx.Node) -> list[fx.Node]:
    """The nodes of the stored weights that read what ``observer`` returns; ``[]`` where they cannot be scaled.

    That is where something else than a layer reads it, as its activation, or a weight that others read too, or a
    grouped convolution, whose weights do not have all its input channels.
    """
    weights: list[fx.Node] = []
    for layer in observer.users:
        if not (is_conv(layer) or is_linear(layer)) or layer.args[0] is not observer or len(layer.args) < 2:
            return []
        weight = layer.args[1]
        while isinstance(weight, fx.Node) and weight.op == "call_module" and len(weight.users) == 1:
            weight = weight.args[0]  # its own observer
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) != 1:
            return []
        if node_value(weight).shape[1] != node_value(observer).shape[channel_axis(layer)]:
            return []
        weights.append(weight)
    return weights


def _is_scaled(observer: fx.Node) -> bool:
    """Whether what ``observer`` reads was scaled for it."""
    source = argument_node(observer, 0)
    inverse = source.args[1] if is_call(source, aten.mul.Tensor) else None
    return isinstance(inverse, fx.Node) and str(inverse.target) == f"{observer.target}{INVERSE}"


def inverse_factors(activation: fx.Node) -> fx.Node | None:
    """The buffer that a scaled activation is multiplied by, before its observer or quantizer; None for any other."""
    buffer = activation.args[1] if is_call(activation, aten.mul.Tensor) else None
    if isinstance(buffer, fx.Node) and buffer.op == "get_attr" and INVERSE in str(buffer.target):
        return buffer
    return None


class ScaleChannels(GraphPass):
    """Divide the channels of observed activations by factors, and multiply the weights behind them.

    Before::

        %o = observer_0(%x, %groups)      %y = conv2d(%o, weight_observer(%w), %b)

    After::

        %s = mul(%x, [C, 1, 1] of 1 / factors)      %o = observer_0(%s, %groups)
        %y = conv2d(%o, weight_observer(%w * factors), %b)

    Legality: a layer is linear in each input channel. Numerics are preserved up to float rounding; where all factors
    are powers of two to the bit, short of the ends of the float range. The weights are multiplied by the inverse of
    what the graph keeps, so that the same can be done to other weights (:meth:`by_inverse`). A weight that something
    else reads stays, and so does its activation (:func:`scalable_weights`); an observer is scaled for once. Source:
    equivalent scaling, SmoothQuant (ICML 2023), eq. 3.
    Meta: what is new takes the module stack of the layers that read it. The observer's range is to be set anew.

    Args:
        factors: By the target of an observer, float32 ``[C]``.

    Raises:
        ValueError: A factor is not positive and finite.
    """

    id: ClassVar[str] = "tfmq::scale_channels"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, values in factors.items():
            self._check(name, values)
        self.inverse = {name: 1.0 / values for name, values in factors.items()}

    @classmethod
    def by_inverse(cls, inverse: Mapping[str, Tensor]) -> ScaleChannels:
        """The pass that multiplies activations by these, as another graph does.

        Args:
            inverse: By the target of an observer, float32 ``[C]``.

        Raises:
            ValueError: One is not positive and finite.
        """
        scale = cls({})
        for name, values in inverse.items():
            scale._check(name, values)
        scale.inverse = dict(inverse)
        return scale

    def _check(self, name: str, values: Tensor) -> None:
        if not bool((values > 0).all()) or not bool(values.isfinite().all()):
            msg = f"{self.id}: the factors of {name!r} must be positive and finite"
            raise ValueError(msg)

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Scale what each named observer reads."""
        modified = False
        for observer in list(graph_module.graph.find_nodes(op="call_module")):
            inverse = self.inverse.get(str(observer.target))
            if inverse is None or _is_scaled(observer):
                continue
            if weights := scalable_weights(observer):
                self._scale(graph_module, observer, weights, inverse)
                modified = True
        return modified

    def _scale(self, graph_module: fx.GraphModule, observer: fx.Node, weights: list[fx.Node], inverse: Tensor) -> None:
        graph, layer = graph_module.graph, next(iter(observer.users))
        trailing = node_value(observer).ndim - 2 if is_conv(layer) else 0
        factors, columns = 1.0 / inverse, inverse.reshape([-1] + [1] * trailing)
        with graph.inserting_before(observer):
            name = add_buffer(graph_module, f"{observer.target}{INVERSE}", columns)
            read = insert_get_attr(graph_module, name, anchor=layer)
            scaled = insert_call(graph, aten.mul.Tensor, (argument_node(observer, 0), read), anchor=layer)
        observer.update_arg(0, scaled)
        for reader, weight in zip(list(observer.users), weights, strict=True):
            values: Any = read_attribute(graph_module, str(weight.target))
            shape = [1, -1] + [1] * (values.ndim - 2)
            name = add_buffer(graph_module, str(weight.target), values.detach() * factors.reshape(shape))
            with graph.inserting_before(weight):
                new = insert_get_attr(graph_module, name, anchor=reader)
            weight.replace_all_uses_with(new)
            erase_unread_attribute(graph_module, weight)
