"""Pieces of quantized graphs, as ``convert`` leaves them."""

import torch

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
#: Scale and zero point that fit numbers of a standard normal distribution, and of its SiLU.
NORMAL, SILU = (0.03, 120), (0.02, 14)


def quantized(builder, node, scale=NORMAL[0], zero_point=NORMAL[1], low=0, high=255, dtype=torch.uint8):
    """The quantize node of ``node``."""
    return builder.call(QUANTIZE, node, scale, zero_point, low, high, dtype)


def dequantized(builder, node):
    """The float values of the quantize node ``node``."""
    return builder.call(DEQUANTIZE, node, *node.args[1:])


def rounded(builder, node, *args):
    """``node`` quantized and dequantized."""
    return dequantized(builder, quantized(builder, node, *args))


def weight(builder, name, shape, *, seed=0, zero=0):
    """A dequantized int8 weight under ``name``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    fan_in = values[0].numel()
    integers = builder.buffer(f"{name}_weight_int8", values)
    sizes = (torch.rand(shape[0], generator=generator) + 0.5) / 70 / fan_in**0.5
    scales = builder.buffer(f"{name}_weight_scale", sizes)
    zeros = builder.buffer(f"{name}_weight_zero_point", torch.full((shape[0],), zero))
    return builder.call(decomposed.dequantize_per_channel.default, integers, scales, zeros, 0, -128, 127, torch.int8)


def conv(builder, node, name, channels, *, kernel=3, stride=1, padding=None, bias=True, groups=1):
    """A quantized convolution of ``node``; its activation is a quantize node or is quantized here."""
    activation = dequantized(builder, node if node.target is QUANTIZE else quantized(builder, node))
    depth = int(node.meta["val"].shape[1]) // groups
    border = kernel // 2 if padding is None else padding
    with builder.inside(name):
        matrix = weight(builder, name.replace(".", "_"), (channels, depth, kernel, kernel))
        constant = builder.parameter(f"{name}.bias", torch.linspace(-0.5, 0.5, channels)) if bias else None
        geometry = ([stride] * 2, [border] * 2, [1, 1], groups)
        return builder.call(aten.conv2d.default, activation, matrix, constant, *geometry)


def linear(builder, node, name, channels, *, bias=True):
    """A quantized linear of ``node``, ``[R, C]``."""
    activation = dequantized(builder, node if node.target is QUANTIZE else quantized(builder, node))
    with builder.inside(name):
        matrix = weight(builder, name.replace(".", "_"), (channels, int(node.meta["val"].shape[1])))
        arguments = (builder.parameter(f"{name}.bias", torch.linspace(-0.5, 0.5, channels)),) if bias else ()
        return builder.call(aten.linear.default, activation, matrix, *arguments)


def group_norm(builder, node, name, groups=4):
    """A GroupNorm of ``node``."""
    channels = int(node.meta["val"].shape[1])
    with builder.inside(name):
        gain = builder.parameter(f"{name}.weight", torch.linspace(0.5, 1.5, channels))
        offset = builder.parameter(f"{name}.bias", torch.linspace(-0.3, 0.3, channels))
        return builder.call(aten.group_norm.default, node, groups, gain, offset, 1e-5, False)
