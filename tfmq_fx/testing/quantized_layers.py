"""Pieces of quantized graphs, as ``convert`` leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .graph_builder import GraphBuilder

__all__ = [
    "NORMAL",
    "QUANTIZE",
    "SILU",
    "attention",
    "conv",
    "dequantized",
    "group_norm",
    "linear",
    "quantized",
    "quantized_by_rows",
    "rounded",
    "weight",
]

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
QUANTIZE_BY_ROWS = decomposed.quantize_per_channel.default
QUANTIZERS = (QUANTIZE, QUANTIZE_BY_ROWS)
#: Scale and zero point that fit numbers of a standard normal distribution, and of its SiLU.
NORMAL, SILU = (0.03, 120), (0.02, 14)


def quantized(
    builder: GraphBuilder,
    node: fx.Node,
    scale: float = NORMAL[0],
    zero_point: int = NORMAL[1],
    low: int = 0,
    high: int = 255,
    dtype: torch.dtype = torch.uint8,
) -> fx.Node:
    """The quantize node of ``node``."""
    return builder.call(QUANTIZE, node, scale, zero_point, low, high, dtype)


def quantized_by_rows(
    builder: GraphBuilder,
    node: fx.Node,
    rows: fx.Node,
    scales: Sequence[float] = (NORMAL[0], 2 * NORMAL[0], NORMAL[0] / 2),
    zero_points: Sequence[int] = (NORMAL[1], 100, 130),
    *,
    each: int | None = None,
    bounds: tuple[int, int] = (0, 255),
    dtype: torch.dtype = torch.uint8,
) -> fx.Node:
    """The quantize node of ``node`` by a row of a table for each item, as timestep groups have it.

    Args:
        builder: Where it is added.
        node: What is quantized, ``[items, ...]``, or ``[items * each, ...]``.
        rows: The row of each item, int64 ``[items]``.
        scales: The scales of the table.
        zero_points: Its zero points.
        each: How many entries of the first axis each item has, one behind the other; None for one.
        bounds: The least and the largest integer.
        dtype: Theirs.
    """
    number = sum(entry.op == "get_attr" for entry in builder.graph.nodes)
    index = rows
    if each is not None:
        column = builder.call(aten.expand.default, builder.call(aten.unsqueeze.default, rows, 1), [-1, each])
        index = builder.call(aten.reshape.default, column, [-1])
    values = (torch.tensor(list(scales)), torch.tensor(list(zero_points)))
    gathered = [
        builder.call(aten.index_select.default, builder.buffer(f"table_{number}_{name}", value), 0, index)
        for name, value in zip(("scales", "zero_points"), values, strict=True)
    ]
    return builder.call(QUANTIZE_BY_ROWS, node, *gathered, 0, *bounds, dtype)


def dequantized(builder: GraphBuilder, node: fx.Node) -> fx.Node:
    """The float values of the quantize node ``node``."""
    operator = DEQUANTIZE if node.target is QUANTIZE else decomposed.dequantize_per_channel.default
    return builder.call(operator, node, *node.args[1:])


def rounded(builder: GraphBuilder, node: fx.Node, *args: Any) -> fx.Node:
    """``node`` quantized and dequantized."""
    return dequantized(builder, quantized(builder, node, *args))


def weight(
    builder: GraphBuilder,
    name: str,
    shape: Sequence[int],
    *,
    seed: int = 0,
    zero: int = 0,
    bounds: tuple[int, int] = (-127, 127),
    dtype: torch.dtype = torch.int8,
) -> fx.Node:
    """A dequantized integer weight under ``name``, its values drawn within ``bounds``, one scale per output channel."""
    generator = torch.Generator().manual_seed(seed)
    low, high = bounds
    values = torch.randint(low, high + 1, tuple(shape), generator=generator, dtype=dtype)
    fan_in = values[0].numel()
    integers = builder.buffer(f"{name}_weight_int8", values)
    sizes = (torch.rand(shape[0], generator=generator) + 0.5) / 70 / fan_in**0.5
    scales = builder.buffer(f"{name}_weight_scale", sizes)
    zeros = builder.buffer(f"{name}_weight_zero_point", torch.full((shape[0],), zero))
    quant = (-128, 127) if dtype is torch.int8 else bounds
    return builder.call(decomposed.dequantize_per_channel.default, integers, scales, zeros, 0, *quant, dtype)


def conv(
    builder: GraphBuilder,
    node: fx.Node,
    name: str,
    channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
    groups: int = 1,
) -> fx.Node:
    """A quantized convolution of ``node``; its activation is a quantize node or is quantized here."""
    activation = dequantized(builder, node if node.target in QUANTIZERS else quantized(builder, node))
    depth = int(node.meta["val"].shape[1]) // groups
    border = kernel // 2 if padding is None else padding
    with builder.inside(name):
        matrix = weight(builder, name.replace(".", "_"), (channels, depth, kernel, kernel))
        constant = builder.parameter(f"{name}.bias", torch.linspace(-0.5, 0.5, channels)) if bias else None
        geometry = ([stride] * 2, [border] * 2, [1, 1], groups)
        return builder.call(aten.conv2d.default, activation, matrix, constant, *geometry)


def linear(builder: GraphBuilder, node: fx.Node, name: str, channels: int, *, bias: bool = True) -> fx.Node:
    """A quantized linear of ``node``, ``[R, C]``."""
    activation = dequantized(builder, node if node.target in QUANTIZERS else quantized(builder, node))
    with builder.inside(name):
        matrix = weight(builder, name.replace(".", "_"), (channels, int(node.meta["val"].shape[1])))
        arguments = (builder.parameter(f"{name}.bias", torch.linspace(-0.5, 0.5, channels)),) if bias else ()
        return builder.call(aten.linear.default, activation, matrix, *arguments)


def group_norm(builder: GraphBuilder, node: fx.Node, name: str, groups: int = 4) -> fx.Node:
    """A GroupNorm of ``node``."""
    channels = int(node.meta["val"].shape[1])
    with builder.inside(name):
        gain = builder.parameter(f"{name}.weight", torch.linspace(0.5, 1.5, channels))
        offset = builder.parameter(f"{name}.bias", torch.linspace(-0.3, 0.3, channels))
        return builder.call(aten.group_norm.default, node, groups, gain, offset, 1e-5, False)


def attention(
    builder: GraphBuilder,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    *,
    mask: fx.Node | None = None,
    softmax_zero: int = 0,
    bits: tuple[int, int, torch.dtype] = (0, 255, torch.uint8),
    rounding: Callable[..., fx.Node] = rounded,
    deferred: bool = False,
) -> fx.Node:
    """Attention of ``[N, H, L, 16]`` whose two products read bytes; ``bits`` are those of the softmax.

    ``rounding`` quantizes and dequantizes: it is called as :func:`rounded`, with the query, the key, the softmax and
    the value in turn. ``deferred`` divides by the sum of the softmax behind the second product.
    """
    with builder.inside("attention"):
        scaled = builder.call(aten.mul.Tensor, query, 0.25)
        transposed_key = builder.call(aten.transpose.int, key, -2, -1)
        factors = rounding(builder, scaled, 0.008, 128), rounding(builder, transposed_key, 0.03, 125)
        scores = builder.call(aten.matmul.default, *factors)
        scores = scores if mask is None else builder.call(aten.add.Tensor, scores, mask)
        if deferred:
            below = builder.call(aten.sub.Tensor, scores, builder.call(aten.amax.default, scores, [-1], True))
            weights = rounding(builder, builder.call(aten.exp.default, below), 1 / 255, softmax_zero, *bits)
        else:
            weights = rounding(builder, builder.call(aten.softmax.int, scores, -1), 1 / 255 / 4, softmax_zero, *bits)
        mixed = builder.call(aten.matmul.default, weights, rounding(builder, value, 0.03, 130))
        if not deferred:
            return mixed
        return builder.call(aten.div.Tensor, mixed, builder.call(aten.sum.dim_IntList, weights, [-1], True))
