"""Compile the operators of our integer kernels through Inductor, as calls of the C++ beside this file.

Each becomes a C++ function in the compiled program, called with pointers and sizes. So there is nothing to load or to
register at run time, and an ahead-of-time package holds the kernels as it holds Inductor's own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tfmq_fx._torch import inductor as inductor_ir
from tfmq_fx._torch.inductor import CppKernelCall, register_inductor_lowering
from tfmq_fx.kernels.operators import OPERATORS

__all__ = ["register_native_kernels"]

FOLDER = Path(__file__).parent
CPP_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "tfmq::bf16",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}


@functools.cache
def _sources() -> str:
    """A digest of the headers: part of the generated code, so that a changed kernel is compiled again."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.h")))).hexdigest()[:16]


def _include(header: str) -> str:
    return f'#include "{FOLDER / header}"  // {_sources()}'


def _pointer(value: Any, name: str) -> str:
    """``name`` as the kernels' own pointer type."""
    dtype = value.get_dtype()
    return f"reinterpret_cast<const {CPP_TYPES[dtype]}*>({name})"


def _call(
    header: str,
    size: Sequence[Any],
    dtype: torch.dtype,
    inputs: Sequence[Any],
    statement: Callable[[Sequence[str], str, Callable[[Any], str]], str],
) -> Any:
    """A call of one kernel; ``statement(inputs, output, number)`` is its C++, ``number`` that of a size."""

    def body(names: Sequence[str], output: str, number: Callable[[Any], str]) -> str:
        pointers = [_pointer(value, name) for value, name in zip(inputs, names, strict=True)]
        return statement(pointers, f"reinterpret_cast<{CPP_TYPES[dtype]}*>({output})", number)

    return CppKernelCall.create(_include(header), size, dtype, inputs, body)


def _numbers(values: Sequence[Any], number: Callable[[Any], str]) -> str:
    return ", ".join(number(value) for value in values)


class _Quantizer:
    """The quantizer of a call in C++: numbers, or the pointers of a table behind the call's other inputs."""

    def __init__(self, one: tuple[Any, Any] | None, table: Sequence[Any] = ()) -> None:
        self.one = one
        self.inputs = [inductor_ir.contiguous(value) for value in table]

    def cpp(self, names: Sequence[str], images: Any, number: Callable[[Any], str]) -> str:
        """The C++ of it, of a call with ``images``; the last of ``names`` are those of its inputs."""
        if self.one is not None:
            scale, zero_point = (number(value) for value in self.one)
            return f"tfmq::SharedQuantizer{{{scale}, int64_t({zero_point})}}"
        scales, zero_points, rows = names[len(names) - len(self.inputs) :]
        table, items = self.inputs[0].get_size()[0], self.inputs[2].get_size()[0]
        sizes = f"{number(table)}, {number(images)} / {number(items)}"
        return f"tfmq::Quantizers{{{scales}, {zero_points}, {rows}, {sizes}}}"


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
    return _scaled_conv(x, weight, (scale, bias), residual, _Quantizer(None), kernel, stride, dtype)


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
    table = _Quantizer(None, (scales, zero_points, rows))
    return _scaled_conv(x, weight, (weight_scale, weight_sum, bias), residual, table, kernel, stride, dtype)


def _scaled_conv(
    x: Any,
    weight: Any,
    constants: Sequence[Any],
    residual: Any,
    table: _Quantizer,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Any:
    added = [] if residual is None else [residual]
    operands = [*(inductor_ir.contiguous(value) for value in (x, weight, *added, *constants)), *table.inputs]
    batch, height, width, depth = x.get_size()
    channels, vectors = constants[0].get_size()[0], int(weight.get_size()[3]) // 16
    out_height, out_width = ((size - k) // s + 1 for size, k, s in zip((height, width), kernel, stride, strict=True))

    def statement(names: Sequence[str], output: str, number: Callable[[Any], str]) -> str:
        image, packed, *others = names
        other = others.pop(0) if added else "nullptr"
        shape = _numbers((batch, height, width, depth, out_height, out_width, channels, *kernel, *stride), number)
        factors = ", ".join(others[: len(constants)])
        scales = f"tfmq::SharedScales{{{factors}}}"
        if table.inputs:
            scales = f"tfmq::ScalesByImage{{{factors}, {table.cpp(others, batch, number)}}}"
        call = f"tfmq::integer_conv<{vectors}, {CPP_TYPES[dtype]}>"
        return f"{call}({image}, {packed}, {scales}, {other}, {output}, tfmq::ConvShape{{{shape}}});"

    return _call("conv.h", (batch, out_height, out_width, channels), dtype, operands, statement)


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
) -> Any:
    return _fused_norm(x, shift, (weight, bias), groups, eps, silu, _Quantizer((scale, zero_point)), padding)


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
) -> Any:
    table = _Quantizer(None, (scales, zero_points, rows))
    return _fused_norm(x, shift, (weight, bias), groups, eps, silu, table, padding)


def _norm(x: Sequence[Any], shift: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> Any:
    none = _Quantizer((1.0, 0))
    return _fused_norm(x, shift, (weight, bias), groups, eps, silu, none, (0, 0, 0, 0), torch.float32)


def _fused_norm(
    x: Sequence[Any],
    shift: Any,
    affine: tuple[Any, Any],
    groups: int,
    eps: float,
    silu: bool,
    quantizer: _Quantizer,
    padding: Sequence[int],
    dtype: torch.dtype = torch.uint8,
) -> Any:
    images = [inductor_ir.contiguous(part) for part in x]
    constants = [inductor_ir.contiguous(value) for value in affine]
    shifts = [] if shift is None else [inductor_ir.contiguous_rows(shift)]
    batch, height, width = x[0].get_size()[:3]
    counts = [part.get_size()[3] for part in x]
    top, left, bottom, right = padding
    source = CPP_TYPES[x[0].get_dtype()]

    def statement(names: Sequence[str], output: str, number: Callable[[Any], str]) -> str:
        parts, rest = list(names[: len(images)]), list(names[len(images) :])
        second = parts[1] if len(parts) > 1 else "nullptr"
        moved = rest[2] if shifts else "nullptr"
        pitch = shifts[0].get_stride()[0] if shifts and shifts[0].get_size()[0] != 1 else 0
        channels = _numbers([*counts, *([0] if len(counts) == 1 else [])], number)
        shape = (
            f"tfmq::NormShape{{{_numbers((batch, height, width, groups), number)}, {{{channels}}}, "
            f"{{{_numbers(padding, number)}}}, {number(pitch)}}}"
        )
        arguments = f"{parts[0]}, {second}, {moved}, {rest[0]}, {rest[1]}, {output}, {shape}"
        kind = f"{'true' if silu else 'false'}, {source}, {CPP_TYPES[dtype]}"
        return f"tfmq::group_norm<{kind}>({arguments}, {number(eps)}, {quantizer.cpp(rest, batch, number)});"

    size = (batch, height + top + bottom, width + left + right, affine[0].get_size()[0])
    return _call("norm.h", size, dtype, [*images, *constants, *shifts, *quantizer.inputs], statement)


def _image(x: Any, enlarge: int, scale: float, zero_point: int, padding: Sequence[int]) -> Any:
    return _bordered_image(x, enlarge, _Quantizer((scale, zero_point)), padding)


def _image_rows(x: Any, enlarge: int, scales: Any, zero_points: Any, rows: Any, padding: Sequence[int]) -> Any:
    return _bordered_image(x, enlarge, _Quantizer(None, (scales, zero_points, rows)), padding)


def _bordered_image(x: Any, enlarge: int, quantizer: _Quantizer, padding: Sequence[int]) -> Any:
    source = inductor_ir.contiguous(x)
    batch, height, width, channels = x.get_size()
    top, left, bottom, right = padding

    def statement(names: Sequence[str], output: str, number: Callable[[Any], str]) -> str:
        shape = f"{_numbers((batch, height, width, channels, enlarge), number)}, {{{_numbers(padding, number)}}}"
        by = quantizer.cpp(names, batch, number)
        return f"tfmq::quantize_image({names[0]}, {output}, tfmq::ImageShape{{{shape}}}, {by});"

    size = (batch, height * enlarge + top + bottom, width * enlarge + left + right, channels)
    return _call("image.h", size, torch.uint8, [source, *quantizer.inputs], statement)


def _broadcast(sizes: Sequence[Any]) -> Any:
    """The one of ``sizes``, of operands that were checked, that is not 1."""
    return next((size for size in sizes if size != 1), sizes[0])


def _strides(value: Any, broadcast: Sequence[Any]) -> list[Any]:
    """The first three strides of ``value``: 0 for the batch and the heads where it has one for all ``wanted``."""
    size, strides = value.get_size(), value.get_stride()
    return [*(0 if n == 1 and m != 1 else s for n, m, s in zip(size, broadcast, strides, strict=False)), strides[2]]


def _attention(
    query: Any, key: Any, value: Any, factor: float, scales: Sequence[float], zero_points: Sequence[int]
) -> Any:
    zeros = (zero_points[0], zero_points[1], 0, zero_points[2])

    def shared(names: Sequence[str], images: Any, number: Callable[[Any], str]) -> str:
        points = ", ".join(f"int64_t({number(zero)})" for zero in zeros)
        return f"tfmq::SharedAttentionQuantizers{{{{{_numbers(scales, number)}}}, {{{points}}}}}"

    return _any_attention(query, key, value, factor, (), shared)


def _attention_rows(query: Any, key: Any, value: Any, factor: float, *values: Any) -> Any:
    table = _Quantizer(None, values)

    def by_rows(names: Sequence[str], images: Any, number: Callable[[Any], str]) -> str:
        return f"tfmq::AttentionQuantizers{{{table.cpp(names, images, number)}}}"

    return _any_attention(query, key, value, factor, table.inputs, by_rows)


def _any_attention(
    query: Any,
    key: Any,
    value: Any,
    factor: float,
    table: Sequence[Any],
    quantizers: Callable[[Sequence[str], Any, Callable[[Any], str]], str],
) -> Any:
    operands = [inductor_ir.contiguous_rows(x) for x in (query, key, value)]
    sizes = [x.get_size() for x in operands]
    batch, key_batch = (_broadcast([size[0] for size in group]) for group in (sizes, sizes[1:]))
    heads, key_heads = (max(int(size[1]) for size in group) for group in (sizes, sizes[1:]))
    length, depth, keys = sizes[0][2], sizes[0][3], sizes[1][2]
    repeated = ((batch, heads), (key_batch, key_heads), (key_batch, key_heads))

    def statement(names: Sequence[str], output: str, number: Callable[[Any], str]) -> str:
        strides = ", ".join(
            f"{{{_numbers(_strides(x, broadcast), number)}}}" for x, broadcast in zip(operands, repeated, strict=True)
        )
        counts = _numbers((batch, heads, length, keys, depth, key_batch, key_heads), number)
        shape = f"tfmq::AttentionShape{{{counts}, {strides}}}"
        by = quantizers(names, batch, number)
        return f"tfmq::integer_attention({', '.join(names[:3])}, {output}, {shape}, {number(factor)}, {by});"

    return _call("attention.h", (batch, length, heads, depth), query.get_dtype(), [*operands, *table], statement)


@functools.cache
def register_native_kernels() -> None:
    """Tell Inductor how to compile the operators of :mod:`tfmq_fx.kernels.operators`."""
    for operator, lowering in (
        (OPERATORS.integer_conv.default, _conv),
        (OPERATORS.integer_conv.rows, _conv_rows),
        (OPERATORS.group_norm.default, _norm),
        (OPERATORS.quantized_group_norm.default, _quantized_norm),
        (OPERATORS.quantized_group_norm.rows, _quantized_norm_rows),
        (OPERATORS.quantized_image.default, _image),
        (OPERATORS.quantized_image.rows, _image_rows),
        (OPERATORS.integer_attention.default, _attention),
        (OPERATORS.integer_attention.rows, _attention_rows),
    ):
        register_inductor_lowering(operator, lowering)
