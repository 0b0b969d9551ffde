"""One call of a kernel as Inductor generates it: the header it includes, its pointers, sizes and quantizers in C++."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tfmq_fx._torch import inductor as inductor_ir
from tfmq_fx._torch.inductor import CppKernelCall

__all__ = ["CPP_TYPES", "Number", "Quantizer", "kernel_call", "numbers"]

#: Writes a size or another number in C++.
Number = Callable[[Any], str]

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


def kernel_call(
    header: str,
    size: Sequence[Any],
    dtype: torch.dtype,
    inputs: Sequence[Any],
    statement: Callable[[Sequence[str], str, Number], str],
) -> Any:
    """A call of one kernel; ``statement(inputs, output, number)`` is its C++, ``number`` that of a size."""

    def body(names: Sequence[str], output: str, number: Number) -> str:
        pointers = [_pointer(value, name) for value, name in zip(inputs, names, strict=True)]
        return statement(pointers, f"reinterpret_cast<{CPP_TYPES[dtype]}*>({output})", number)

    return CppKernelCall.create(_include(header), size, dtype, inputs, body)


def numbers(values: Sequence[Any], number: Number) -> str:
    """``values`` in C++, with commas between them."""
    return ", ".join(number(value) for value in values)


class Quantizer:
    """The quantizer of a call in C++: numbers, or the pointers of a table behind the call's other inputs."""

    def __init__(self, one: tuple[Any, Any] | None, table: Sequence[Any] = ()) -> None:
        self.one = one
        self.inputs = [inductor_ir.contiguous(value) for value in table]

    def cpp(self, names: Sequence[str], images: Any, number: Number) -> str:
        """The C++ of it, of a call with ``images``; the last of ``names`` are those of its inputs."""
        if self.one is not None:
            scale, zero_point = (number(value) for value in self.one)
            return f"tfmq::SharedQuantizer{{{scale}, int64_t({zero_point})}}"
        scales, zero_points, rows = names[len(names) - len(self.inputs) :]
        table, items = self.inputs[0].get_size()[0], self.inputs[2].get_size()[0]
        # Of an empty batch there are no items; the kernel then reads none of them, but nothing may be divided by 0.
        sizes = f"{number(table)}, {number(images)} / std::max<int64_t>(1, {number(items)})"
        return f"tfmq::Quantizers{{{scales}, {zero_points}, {rows}, {sizes}}}"
