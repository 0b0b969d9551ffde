"""Run convolutions whose activation parameters are tensors on oneDNN's integer kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.kernels.checks import MAX_SIGNED_PRODUCTS
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import insert_call, read_attribute, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = ["LowerIndexedConvs"]

aten = torch.ops.aten
#: Spatial axes of the convolutions that the kernel covers.
AXES: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}
DEFAULTS = (None, 1, 0, 1, 1)


def is_indexed_conv(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a convolution of integers in float: 8-bit by tensor parameters, by a constant int8 weight."""
    if not is_call(node, *AXES) or node.kwargs:
        return False
    activation, weight = node.args[:2]
    if not is_call(activation, decomposed.dequantize_per_tensor.tensor):
        return False
    if not is_call(weight, decomposed.dequantize_per_channel.default) or weight.args[3] != 0:
        return False
    constant = all(isinstance(a, fx.Node) and a.op == "get_attr" for a in weight.args[:3])
    if not constant or weight.args[6] != torch.int8 or activation.args[5] not in (torch.uint8, torch.int8):
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    if node_value(weight)[0].numel() > MAX_SIGNED_PRODUCTS:  # the kernel adds them up in an int32, which wraps
        return False
    values = [node_value(node), *([node_value(bias)] if isinstance(bias, fx.Node) else [])]
    zero_points: Tensor = read_attribute(graph_module, str(argument_node(weight, 2).target))
    # The kernel ignores a weight's zero points, silently.
    return all(value.dtype == torch.float32 for value in values) and not bool(zero_points.any())


class LowerIndexedConvs(GraphPass):
    """Replace a convolution of dequantized integers by the integer kernel, where scale and zero point are tensors.

    Before::

        %x = dequantize_per_tensor.tensor(%q, %s, %z, …)      %w = dequantize_per_channel(%i, %c, %zeros, 0, …)
        %y = conv2d(%x, %w, %b, …)

    After::

        %p = onednn.qconv_prepack(%i, %c, 1.0, 0, …)
        %y = onednn.qconv_pointwise.tensor(%q, %s, %z, %p, %c, %zeros, %b, …)

    Legality: the kernel computes the same sum in integers and scales it once; it pads with the zero point, which is
    exactly zero. ``%s`` and ``%z`` have one element. Numerics are preserved up to float rounding. Why: Inductor
    itself finds its integer convolution only where the parameters are numbers, and its linear also where they are
    tensors. The prepacking is of constants alone, so freezing folds it.
    Meta: the new nodes take the module stack of the convolution.
    """

    id: ClassVar[str] = "tfmq::lower_indexed_convs"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Replace every convolution of integers with tensor parameters."""
        graph, onednn = graph_module.graph, torch.ops.onednn
        convs = [node for node in graph.nodes if is_indexed_conv(graph_module, node)]
        for node in convs:
            arguments: list[Any] = list(node.args)
            arguments += DEFAULTS[len(arguments) - 2 :]
            activation, weight, bias = arguments[:3]
            stride, padding, dilation = (_per_axis(value, AXES[node.target]) for value in arguments[3:6])
            groups = arguments[6]
            quantized, scale, zero = activation.args[:3]
            integers, weight_scale, weight_zero = weight.args[:3]
            with graph.inserting_before(node):
                packed = insert_call(
                    graph,
                    onednn.qconv_prepack.default,
                    (integers, weight_scale, 1.0, 0, stride, padding, dilation, groups, None),
                    anchor=node,
                )
                operands = (quantized, scale, zero, packed, weight_scale, weight_zero, bias)
                output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
                new = insert_call(
                    graph,
                    onednn.qconv_pointwise.tensor,
                    (*operands, stride, padding, dilation, groups, *output),
                    anchor=node,
                )
            replace_node(node, new)
        if convs:
            graph.eliminate_dead_code()
        return bool(convs)


def _per_axis(value: Any, axes: int) -> list[int]:
    """A stride, padding or dilation for each spatial axis."""
    numbers = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return numbers * axes if len(numbers) == 1 else numbers
