"""Which layers of a q/dq graph can run on integer kernels, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.kernels.checks import MAX_SIGNED_PRODUCTS
from tfmq_fx.lowering.report.reasons import (
    BRANCH,
    FUSED_ATTENTION,
    NO_ACTIVATION,
    NO_MATMUL,
    NO_OPERATOR,
    NO_RULE,
    NO_WEIGHT,
    ONE_CHANNEL,
    PER_ROW,
    TOO_DEEP,
    WIDE,
)
from tfmq_fx.lowering.report.report import ReportEntry
from tfmq_fx.passes.analysis import data_dependence
from tfmq_fx.passes.analysis.multiply_adds import multiply_adds
from tfmq_fx.passes.layout.add_low_rank_branches import is_branch
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import (
    is_attention,
    is_call,
    is_conv,
    is_matmul,
    is_weighted,
    module_path,
    node_value,
)

__all__ = ["classify", "layers", "reads_one_channel", "reads_wide_integers", "sums_may_overflow"]

aten = torch.ops.aten
WEIGHT = decomposed.dequantize_per_channel.default
PER_TENSOR = (decomposed.dequantize_per_tensor.default, decomposed.dequantize_per_tensor.tensor)
PER_ITEM = decomposed.dequantize_per_channel.default
#: What oneDNN's integer kernels cover through Inductor.
INTEGER_OPERATORS = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
INTEGER_DTYPES = (torch.uint8, torch.int8)


def reads_one_channel(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution of a one-channel input: channels last and first are one layout there."""
    source = node.args[0]
    return is_conv(node) and isinstance(source, fx.Node) and node_value(source).shape[1] == 1


def reads_wide_integers(node: fx.Node) -> bool:
    """Whether ``node`` is a layer whose activation was quantized to more than 8 bits."""
    source = node.args[0]
    return is_weighted(node) and is_call(source, *PER_TENSOR, PER_ITEM) and _integers(source) not in INTEGER_DTYPES


def _integers(dequantize: fx.Node) -> Any:
    """The dtype that ``dequantize`` reads."""
    return dequantize.args[6 if is_call(dequantize, PER_ITEM) else 5]


def sums_may_overflow(node: fx.Node) -> bool:
    """Whether an int32 cannot hold the sums of products of a layer: they would wrap."""
    weight = node_value(node.args[1]) if is_weighted(node) and isinstance(node.args[1], fx.Node) else None
    return isinstance(weight, Tensor) and weight.ndim > 1 and weight[0].numel() > MAX_SIGNED_PRODUCTS


def _weight_fits(graph_module: fx.GraphModule, weight: fx.Node) -> bool:
    zero_point = weight.args[2]
    assert isinstance(zero_point, fx.Node)
    zero_points = read_attribute(graph_module, str(zero_point.target))
    return weight.args[6] == torch.int8 and not bool(zero_points.any())


def _reason(graph_module: fx.GraphModule, node: fx.Node, kept_float: Mapping[str, str], name: str) -> str:
    """Why ``node`` cannot run on an integer kernel, or ``""``."""
    if not (is_weighted(node) or is_matmul(node)):
        return kept_float.get(name) or (FUSED_ATTENTION if is_attention(node) else NO_RULE)
    left: Any = node.args[0]
    right: Any = node.args[1]
    quantized_left = is_call(left, *PER_TENSOR, PER_ITEM)
    quantized_right = is_call(right, *PER_TENSOR, PER_ITEM)
    if not (quantized_left or quantized_right):
        return kept_float.get(name) or "it was not annotated"
    if is_matmul(node):
        wide = [side for side in (left, right) if is_call(side, *PER_TENSOR) and side.args[5] not in INTEGER_DTYPES]
        return WIDE if wide else NO_MATMUL
    if not quantized_right:
        return NO_WEIGHT
    if not quantized_left:
        return BRANCH if is_branch(node) else NO_ACTIVATION
    if is_call(left, PER_ITEM):
        return PER_ROW if _integers(left) in INTEGER_DTYPES else WIDE
    if not is_call(right, WEIGHT) or not _weight_fits(graph_module, right) or left.args[5] not in INTEGER_DTYPES:
        return WIDE
    if node.target not in INTEGER_OPERATORS:
        return NO_OPERATOR
    if sums_may_overflow(node):
        return TOO_DEEP
    return ONE_CHANNEL if reads_one_channel(node) else ""


def layers(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Every node that multiplies, in graph order: what :func:`classify` has an entry for."""
    return list(_work(graph_module))


def _work(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """The multiply-adds of every layer; operators of constants alone, such as a norm of weights, are none."""
    counts, dependence = multiply_adds(graph_module), data_dependence(graph_module)
    return {
        node: counts.get(node, 0)
        for node in graph_module.graph.nodes
        if node_value(node) is not None
        and (is_weighted(node) or is_matmul(node) or (node in counts and bool(dependence[node])))
    }


def classify(graph_module: fx.GraphModule, kept_float: Mapping[str, str]) -> list[ReportEntry]:
    """List every layer that multiplies; an eligible one is expected on an integer kernel, the others say why not.

    Args:
        graph_module: The q/dq graph that is about to be compiled.
        kept_float: Names of layers that stay float on purpose, with reasons.
    """
    entries = []
    for node, count in _work(graph_module).items():
        operator = str(node.target).removeprefix("aten.").split(".")[0]
        name = module_path(node) or operator
        weight = node.args[1] if len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and str(weight.target).endswith(".weight"):
            name = str(weight.target).removesuffix(".weight")
        reason = _reason(graph_module, node, kept_float, name)
        kernel = "float" if reason else "integer"
        entries.append(ReportEntry(name, operator, kernel, reason, eligible=not reason, multiply_adds=count))
    return entries
