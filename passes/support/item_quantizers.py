"""Quantizers with parameters for each item of the batch, and the readers that those can be taken out of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.support.arguments import argument_node, called_operator
from tfmq_fx.passes.support.byte_quantizers import row_table
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call, is_matmul, node_value

__all__ = ["ItemQuantizer", "constant_weight_of", "item_quantizer", "sums_of"]

aten = torch.ops.aten
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_channel.default, decomposed.dequantize_per_channel.default
BYTES = (torch.uint8, torch.int8)
#: Layers whose result is linear in their input; the weight is their second argument, the bias the third.
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
LAYERS = (*CONVS, aten.linear.default)


@dataclass(frozen=True, eq=False)
class ItemQuantizer:
    """A pair of quantize and dequantize along the batch, by parameters that are gathered for each item.

    Attributes:
        quantize: The quantize node.
        restored: The dequantize node.
        scales: Its table of scales, ``[G]``.
        zero_points: Its table of zero points, ``[G]``.
        constant: The zero point of all rows, or None where they differ or are no bytes.
        factored: The readers that its parameters can be taken out of.
        others: The other readers.
    """

    quantize: fx.Node
    restored: fx.Node
    scales: Tensor
    zero_points: Tensor
    constant: int | None
    factored: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]

    @property
    def index(self) -> fx.Node:
        """The node with the row of every entry of the first axis."""
        return argument_node(argument_node(self.quantize, 1), 2)

    @property
    def ndim(self) -> int:
        """The axes of the activation."""
        return int(node_value(self.quantize).ndim)


def _is_pair(restored: Any) -> bool:
    """Whether ``restored`` dequantizes what was quantized along the batch, by parameters gathered for each item."""
    if not is_call(restored, DEQUANTIZE) or not is_call(restored.args[0], QUANTIZE) or restored.kwargs:
        return False
    quantize: Any = restored.args[0]
    gathers = [quantize.args[1], quantize.args[2]]
    if quantize.args[3] != 0 or restored.args[1:] != quantize.args[1:] or node_value(restored).ndim < 2:
        return False
    if not all(is_call(gather, aten.index_select.default) and gather.args[1] == 0 for gather in gathers):
        return False
    if any(gather.args[0].op != "get_attr" for gather in gathers):
        return False
    return gathers[0].args[2] is gathers[1].args[2] and node_value(restored).dtype == torch.float32


def _is_factored(layer: fx.Node, restored: fx.Node, constant: int | None) -> bool:
    """Whether the parameters of ``restored`` can be taken out of ``layer``."""
    if layer.kwargs or node_value(layer).dtype != torch.float32:
        return False
    if is_matmul(layer):
        same = all(node_value(argument_node(layer, side)).ndim == node_value(layer).ndim for side in (0, 1))
        return constant is not None and same and node_value(layer).ndim > 2 and layer.args[0] is not layer.args[1]
    if not is_call(layer, *LAYERS) or layer.args[0] is not restored or restored in layer.args[1:]:
        return False
    if is_call(layer, *CONVS) and node_value(restored).ndim != node_value(argument_node(layer, 1)).ndim:
        return False  # an image without a batch
    return constant is not None or (constant_weight_of(layer) is not None and _has_fixed_image(layer))


def constant_weight_of(layer: fx.Node) -> Tensor | None:
    """The weight of a layer as a constant of float; None where it is computed."""
    node, owner = argument_node(layer, 1), layer.graph.owning_module
    assert owner is not None
    if node.op == "get_attr":
        value: Tensor = read_attribute(owner, str(node.target))
        return value.detach()
    if not is_call(node, DEQUANTIZE) or any(source.op != "get_attr" for source in node.all_input_nodes):
        return None
    with torch.no_grad():
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda source: read_attribute(owner, str(source.target))
        )
        restored: Tensor = called_operator(node)(*args, **kwargs)
    return restored


def _has_fixed_image(layer: fx.Node) -> bool:
    """Whether the sizes of a layer's images are numbers, which a border makes its sums depend on."""
    sizes = node_value(argument_node(layer, 0)).shape[1:]
    return is_call(layer, aten.linear.default) or all(isinstance(size, int) for size in sizes)


def sums_of(layer: fx.Node, weight: Tensor) -> Tensor:
    """What the layer gives for an input of ones, in float64 and rounded: ``[1, …]``, the axes those of its result."""
    weight = weight.double()
    if is_call(layer, aten.linear.default):
        return weight.sum(1).float().reshape([1] * (node_value(layer).ndim - 1) + [-1])
    padded: Any = layer.args[4] if len(layer.args) > 4 else 0
    borders = [padded] if isinstance(padded, int) else list(padded)
    if not any(borders):
        return weight.flatten(1).sum(1).float().reshape([1, -1] + [1] * (weight.ndim - 2))
    image = torch.ones(1, *node_value(argument_node(layer, 0)).shape[1:], dtype=torch.float64)
    with torch.no_grad():
        result: Tensor = called_operator(layer)(image, weight, None, *layer.args[3:])
    return result.float()


def _tables(quantize: fx.Node) -> tuple[Tensor, Tensor]:
    owner = quantize.graph.owning_module
    assert owner is not None
    names = (argument_node(argument_node(quantize, position), 0).target for position in (1, 2))
    scales, zero_points = (read_attribute(owner, str(name)).detach() for name in names)
    return scales, zero_points


def _constant_zero(quantize: fx.Node) -> int | None:
    """The zero point of all rows, or None where they differ or are no bytes."""
    values = set(_tables(quantize)[1].tolist())
    return int(values.pop()) if len(values) == 1 and row_table(quantize) is not None else None


def item_quantizer(restored: fx.Node) -> ItemQuantizer | None:
    """The quantizer whose dequantize node is ``restored``, or None where it has no parameters of each item."""
    if not _is_pair(restored):
        return None
    quantize = argument_node(restored, 0)
    constant, readers = _constant_zero(quantize), list(restored.users)
    narrow = quantize.args[6] in BYTES  # engines have integer layers of bytes alone; float32 loses sums of more
    factored = tuple(reader for reader in readers if narrow and _is_factored(reader, restored, constant))
    others = tuple(reader for reader in readers if reader not in factored)
    return ItemQuantizer(quantize, restored, *_tables(quantize), constant, factored, others)
