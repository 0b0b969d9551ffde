"""Pieces of quantized graphs, as ``convert`` leaves them."""

from __future__ import annotations

from collections.abc import Sequence
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
    "rounded",
    "weight",
]

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
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


def dequantized(builder: GraphBuilder, node: fx.Node) -> fx.Node:
    """The float values of the quantize node ``node``."""
    return builder.call(DEQUANTIZE, node, *node.args[1:])


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
    activation = dequantized(builder, node if node.target is QUANTIZE else quantized(builder, node))
    depth = int(node.meta["val"].shape[1]) // groups
    border = kernel // 2 if padding is None else padding
    with builder.inside(name):
        matrix = weight(builder, name.replace(".", "_"), (channels, depth, kernel, kernel))
        constant = builder.parameter(f"{name}.bias", torch.linspace(-0.5, 0.5, channels)) if bias else None
        geometry = ([stride] * 2, [border] * 2, [1, 1], groups)
        return builder.call(aten.conv2d.default, activation, matrix, constant, *geometry)


def linear(builder: GraphBuilder, node: fx.Node, name: str, channels: int, *, bias: bool = True) -> fx.Node:
    """A quantized linear of ``node``, ``[R, C]``."""
    activation = dequantized(builder, node if node.target is QUANTIZE else quantized(builder, node))
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
) -> fx.Node:
    """Attention of ``[N, H, L, 16]`` whose two products read bytes; ``bits`` are those of the softmax."""
    with builder.inside("attention"):
        scaled = builder.call(aten.mul.Tensor, query, 0.25)
        transposed_key = builder.call(aten.transpose.int, key, -2, -1)
        factors = rounded(builder, scaled, 0.008, 128), rounded(builder, transposed_key, 0.03, 125)
        scores = builder.call(aten.matmul.default, *factors)
        scores = scores if mask is None else builder.call(aten.add.Tensor, scores, mask)
        weights = builder.call(aten.softmax.int, scores, -1)
        return builder.call(
            aten.matmul.default,
            rounded(builder, weights, 1 / 255 / 4, softmax_zero, *bits),
            rounded(builder, value, 0.03, 130),
        )
