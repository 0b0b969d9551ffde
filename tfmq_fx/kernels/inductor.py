"""Compile the operators of our integer kernels through Inductor, as calls of the C++ beside this file.

Each becomes a C++ function in the compiled program, called with pointers and sizes. So there is nothing to load or to
register at run time, and an ahead-of-time package holds the kernels as it holds Inductor's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from tfmq_fx._torch import inductor as inductor_ir
from tfmq_fx._torch.inductor import register_inductor_lowering
from tfmq_fx.kernels.inductor_attention import attention, attention_rows
from tfmq_fx.kernels.inductor_calls import CPP_TYPES, Number, Quantizer, kernel_call, numbers
from tfmq_fx.kernels.inductor_pointwise import pointwise, pointwise_rows
from tfmq_fx.kernels.pointwise import OPERATORS

__all__ = ["register_native_kernels"]


def _conv(
    x: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    residual: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Any:
    return _scaled_conv(x, weight, (scale, bias), residual, Quantizer(None), kernel, stride, dtype)


def _conv_rows(
    x: Any,
    weight: Any,
    weight_scale: Any,
    weight_sum: Any,
    bias: Any,
    residual: Any,
    scales: Any,
    zero_points: Any,
    rows: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Any:
    table = Quantizer(None, (scales, zero_points, rows))
    return _scaled_conv(x, weight, (weight_scale, weight_sum, bias), residual, table, kernel, stride, dtype)


def _scaled_conv(
    x: Any,
    weight: Any,
    constants: Sequence[Any],
    residual: Any,
    table: Quantizer,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Any:
    added = [] if residual is None else [residual]
    operands = [*(inductor_ir.contiguous(value) for value in (x, weight, *added, *constants)), *table.inputs]
    batch, height, width, depth = x.get_size()
    channels, vectors = constants[0].get_size()[0], int(weight.get_size()[3]) // 16
    out_height, out_width = ((size - k) // s + 1 for size, k, s in zip((height, width), kernel, stride, strict=True))

    def statement(names: Sequence[str], output: str, number: Number) -> str:
        image, packed, *others = names
        other = others.pop(0) if added else "nullptr"
        shape = numbers((batch, height, width, depth, out_height, out_width, channels, *kernel, *stride), number)
        factors = ", ".join(others[: len(constants)])
        scales = f"tfmq::SharedScales{{{factors}}}"
        if table.inputs:
            scales = f"tfmq::ScalesByImage{{{factors}, {table.cpp(others, batch, number)}}}"
        call = f"tfmq::integer_conv<{vectors}, {CPP_TYPES[dtype]}>"
        return f"{call}({image}, {packed}, {scales}, {other}, {output}, tfmq::ConvShape{{{shape}}});"

    return kernel_call("conv.h", (batch, out_height, out_width, channels), dtype, operands, statement)


def _quantized_norm(
    x: Sequence[Any],
    shift: Any,
    weight: Any,
    bias: Any,
    groups: int,
    eps: float,
    silu: bool,
    scale: float,
    zero_point: int,
    padding: Sequence[int],
    factors: Any = None,
) -> Any:
    quantizer = Quantizer((scale, zero_point))
    return _fused_norm(x, shift, (weight, bias, factors), groups, eps, silu, quantizer, padding)


def _quantized_norm_rows(
    x: Sequence[Any],
    shift: Any,
    weight: Any,
    bias: Any,
    groups: int,
    eps: float,
    silu: bool,
    scales: Any,
    zero_points: Any,
    rows: Any,
    padding: Sequence[int],
    factors: Any = None,
) -> Any:
    table = Quantizer(None, (scales, zero_points, rows))
    return _fused_norm(x, shift, (weight, bias, factors), groups, eps, silu, table, padding)


def _norm(x: Sequence[Any], shift: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> Any:
    none = Quantizer((1.0, 0))
    return _fused_norm(x, shift, (weight, bias, None), groups, eps, silu, none, (0, 0, 0, 0), torch.float32)


def _fused_norm(
    x: Sequence[Any],
    shift: Any,
    affine: tuple[Any, Any, Any],
    groups: int,
    eps: float,
    silu: bool,
    quantizer: Quantizer,
    padding: Sequence[int],
    dtype: torch.dtype = torch.uint8,
) -> Any:
    images = [inductor_ir.contiguous(part) for part in x]
    constants = [inductor_ir.contiguous(value) for value in affine if value is not None]
    shifts = [] if shift is None else [inductor_ir.contiguous_rows(shift)]
    batch, height, width = x[0].get_size()[:3]
    counts = [part.get_size()[3] for part in x]
    top, left, bottom, right = padding
    source = CPP_TYPES[x[0].get_dtype()]

    def statement(names: Sequence[str], output: str, number: Number) -> str:
        parts, rest = list(names[: len(images)]), list(names[len(images) :])
        second = parts[1] if len(parts) > 1 else "nullptr"
        by = rest[2] if len(constants) > 2 else "nullptr"
        moved = rest[len(constants)] if shifts else "nullptr"
        pitch = shifts[0].get_stride()[0] if shifts and shifts[0].get_size()[0] != 1 else 0
        channels = numbers([*counts, *([0] if len(counts) == 1 else [])], number)
        shape = (
            f"tfmq::NormShape{{{numbers((batch, height, width, groups), number)}, {{{channels}}}, "
            f"{{{numbers(padding, number)}}}, {number(pitch)}}}"
        )
        arguments = f"{parts[0]}, {second}, {moved}, {rest[0]}, {rest[1]}, {by}, {output}, {shape}"
        kind = f"{'true' if silu else 'false'}, {source}, {CPP_TYPES[dtype]}"
        return f"tfmq::group_norm<{kind}>({arguments}, {number(eps)}, {quantizer.cpp(rest, batch, number)});"

    size = (batch, height + top + bottom, width + left + right, affine[0].get_size()[0])
    return kernel_call("norm.h", size, dtype, [*images, *constants, *shifts, *quantizer.inputs], statement)


def _image(x: Any, enlarge: int, scale: float, zero_point: int, padding: Sequence[int], factors: Any = None) -> Any:
    return _bordered_image(x, factors, enlarge, Quantizer((scale, zero_point)), padding)


def _image_rows(
    x: Any, enlarge: int, scales: Any, zero_points: Any, rows: Any, padding: Sequence[int], factors: Any = None
) -> Any:
    return _bordered_image(x, factors, enlarge, Quantizer(None, (scales, zero_points, rows)), padding)


def _bordered_image(x: Any, factors: Any, enlarge: int, quantizer: Quantizer, padding: Sequence[int]) -> Any:
    operands = [inductor_ir.contiguous(value) for value in (x, factors) if value is not None]
    batch, height, width, channels = x.get_size()
    top, left, bottom, right = padding

    def statement(names: Sequence[str], output: str, number: Number) -> str:
        shape = f"{numbers((batch, height, width, channels, enlarge), number)}, {{{numbers(padding, number)}}}"
        by = names[1] if len(operands) > 1 else "nullptr"
        arguments = f"{names[0]}, {by}, {output}, tfmq::ImageShape{{{shape}}}"
        return f"tfmq::quantize_image({arguments}, {quantizer.cpp(names, batch, number)});"

    size = (batch, height * enlarge + top + bottom, width * enlarge + left + right, channels)
    return kernel_call("image.h", size, torch.uint8, [*operands, *quantizer.inputs], statement)


@functools.cache
def register_native_kernels() -> None:
    """Tell Inductor how to compile the operators of :mod:`tfmq_fx.kernels.operators` and their overloads ``.rows``."""
    for operator, lowering in (
        (OPERATORS.integer_conv.default, _conv),
        (OPERATORS.integer_conv.rows, _conv_rows),
        (OPERATORS.group_norm.default, _norm),
        (OPERATORS.quantized_group_norm.default, _quantized_norm),
        (OPERATORS.quantized_group_norm.rows, _quantized_norm_rows),
        (OPERATORS.quantized_image.default, _image),
        (OPERATORS.quantized_image.rows, _image_rows),
        (OPERATORS.integer_pointwise_conv.default, pointwise),
        (OPERATORS.integer_pointwise_conv.rows, pointwise_rows),
        (OPERATORS.integer_attention.default, attention),
        (OPERATORS.integer_attention.rows, attention_rows),
    ):
        register_inductor_lowering(operator, lowering)
