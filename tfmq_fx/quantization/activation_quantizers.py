"""The activation quantizers of a converted graph, with their parameters, by where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.quantized.scale_channels import inverse_factors
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call
from tfmq_fx.quantization.sites import Site, numbered_operations, read_at

__all__ = ["ActivationQuantizer", "activation_quantizers"]

PER_TENSOR = decomposed.quantize_per_tensor.default
PER_ROW = decomposed.quantize_per_channel.default
#: What conversion inserts where a layer needs other strides than a quantizer gives (:func:`redirect_users`).
LAYOUTS = (torch.ops.aten.contiguous.default, torch.ops.aten.permute.default)
DEQUANTIZE = (decomposed.dequantize_per_tensor.default, decomposed.dequantize_per_channel.default)


@dataclass(frozen=True, eq=False)
class ActivationQuantizer:
    """One quantize node and what it is given.

    Attributes:
        node: The node.
        scale: Float32 ``[R]``: one, or one for each row or group.
        zero_point: Int64 ``[R]``.
        bounds: Smallest and largest integer.
        rows: The node with the row of each entry, int64 ``[N]``; None for one set of parameters.
        inverse: What the activation's channels are multiplied by before it is quantized, ``[C, ...]``, or None.
    """

    node: fx.Node
    scale: Tensor
    zero_point: Tensor
    bounds: tuple[int, int]
    rows: fx.Node | None = None
    inverse: Tensor | None = None

    @property
    def activation(self) -> fx.Node:
        """What it quantizes."""
        return argument_node(self.node, 0)

    @property
    def dequantizers(self) -> list[fx.Node]:
        """The nodes behind it that give floats again."""
        return [user for user in self.node.users if is_call(user, *DEQUANTIZE)]


def activation_quantizers(converted: fx.GraphModule) -> dict[Site, ActivationQuantizer]:
    """Every quantizer of an activation, by each site that reads what it quantized.

    Raises:
        ConfigError: A quantizer has parameters that are neither numbers nor rows of a table, as other tools make them.
    """
    operations, quantizers = numbered_operations(converted), {}
    for node in converted.graph.nodes:
        if not str(node.target).startswith("quantized_decomposed.quantize_"):
            continue
        quantizer = _read(converted, node)
        quantizers.update(dict.fromkeys(read_at(_laid_out(quantizer.dequantizers), operations), quantizer))
    return quantizers


def _laid_out(dequantizers: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes and those that give their values another layout, which conversion puts before a layer."""
    found = list(dequantizers)
    for node in found:  # grows meanwhile
        found += [user for user in node.users if is_call(user, *LAYOUTS) and user not in found]
    return found


def _read(converted: fx.GraphModule, node: fx.Node) -> ActivationQuantizer:
    args: Any = node.args
    buffer = inverse_factors(argument_node(node, 0))
    inverse = None if buffer is None else read_attribute(converted, str(buffer.target)).detach().reshape(-1)
    if is_call(node, PER_TENSOR) and all(isinstance(value, (int, float)) for value in args[1:3]):
        scale, zero_point = torch.tensor([float(args[1])]), torch.tensor([int(args[2])])
        return ActivationQuantizer(node, scale, zero_point, (args[3], args[4]), None, inverse)
    if is_call(node, PER_ROW) and all(_is_gathered(value) for value in args[1:3]):
        scale, zero_point = (read_attribute(converted, str(gather.args[0].target)).detach() for gather in args[1:3])
        return ActivationQuantizer(node, scale, zero_point, (args[4], args[5]), args[1].args[2], inverse)
    msg = (
        f"the quantizer {node.name!r} of this program has parameters that another tool chose, and they cannot be kept: "
        "quantize the other model with its own calibration batches"
    )
    raise ConfigError(msg)


def _is_gathered(value: Any) -> bool:
    """Whether parameters are looked up in a table that the graph holds."""
    table = value.args[0] if is_call(value, torch.ops.aten.index_select.default) else None
    return isinstance(table, fx.Node) and table.op == "get_attr"
