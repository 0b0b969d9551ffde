"""The compiled kernels, called as the operators are: sizes and strides are worked out as the lowering does it."""

import ctypes
import functools

import torch

from tests.kernels.toolchain import OPTIMIZED, build

GUARD = 64
JUNK = 0xA5


@functools.cache
def library():
    return ctypes.CDLL(str(build("exports.cpp", [*OPTIMIZED, "-shared", "-fPIC"])))


class Guarded:
    """A result full of junk between bytes that nobody may write."""

    def __init__(self, size, dtype):
        self.size, self.dtype = size, dtype
        count = torch.Size(size).numel() * dtype.itemsize
        self.memory = torch.full((count + 2 * GUARD,), JUNK, dtype=torch.uint8)

    @property
    def pointer(self):
        return ctypes.c_void_p(self.memory.data_ptr() + GUARD)

    def value(self):
        around = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        assert bool((around == JUNK).all()), "the kernel wrote beside its result"
        return self.memory[GUARD:-GUARD].view(self.dtype).reshape(self.size)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*(int(value) for value in values))


def real(value):
    return ctypes.c_float(value)


def integer_conv(x, weight, scale, bias, residual, kernel, stride, dtype, *, threads=1):
    library().threads(threads)
    batch, height, width, depth = x.shape
    rows, columns = ((n - k) // s + 1 for n, k, s in zip((height, width), kernel, stride, strict=True))
    out = Guarded((batch, rows, columns, scale.numel()), dtype)
    shape = numbers(batch, height, width, depth, rows, columns, scale.numel(), *kernel, *stride)
    operands = [pointer(tensor) for tensor in (x, weight, scale, bias, residual)]
    narrow, vectors = int(dtype == torch.bfloat16), weight.shape[3] // 16
    library().integer_conv(narrow, vectors, *operands, out.pointer, shape)
    return out.value()


def group_norm(x, shift, weight, bias, groups, eps, silu, quantizer=None, padding=(0, 0, 0, 0), *, threads=1):
    library().threads(threads)
    batch, height, width = x[0].shape[:3]
    counts = [part.shape[3] for part in x] + [0] * (2 - len(x))
    top, left, bottom, right = padding
    size = (batch, height + top + bottom, width + left + right, sum(counts))
    out = Guarded(size, torch.float32 if quantizer is None else torch.uint8)
    pitch = 0 if shift is None or shift.shape[0] == 1 else shift.stride(0)
    shape = numbers(batch, height, width, groups, *counts, *padding, pitch)
    narrow, scale, zero = int(x[0].dtype == torch.bfloat16), *(quantizer or (1.0, 0))
    operands = [pointer(tensor) for tensor in (x[0], x[1] if len(x) > 1 else None, shift, weight, bias)]
    kind = (narrow, int(quantizer is not None), int(silu))
    library().group_norm(*kind, *operands, out.pointer, shape, real(eps), real(scale), ctypes.c_int64(zero))
    return out.value()


def quantized_image(x, enlarge, scale, zero_point, padding, *, threads=1):
    library().threads(threads)
    batch, height, width, channels = x.shape
    top, left, bottom, right = padding
    out = Guarded((batch, height * enlarge + top + bottom, width * enlarge + left + right, channels), torch.uint8)
    shape = numbers(*x.shape, enlarge, *padding)
    narrow = int(x.dtype == torch.bfloat16)
    library().quantize_image(narrow, pointer(x), out.pointer, shape, real(scale), ctypes.c_int64(zero_point))
    return out.value()


class Affine(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_float), ("zero_point", ctypes.c_int))


def integer_attention(query, key, value, factor, scales, zero_points, *, threads=1):
    library().threads(threads)
    batch, heads = (max(x.shape[axis] for x in (query, key, value)) for axis in (0, 1))
    shared = [max(x.shape[axis] for x in (key, value)) for axis in (0, 1)]
    strides = []
    for x, wanted in ((query, (batch, heads)), (key, shared), (value, shared)):
        repeated = [n == 1 and m != 1 for n, m in zip(x.shape[:2], wanted, strict=True)]
        strides += [0 if again else s for again, s in zip(repeated, x.stride()[:2], strict=True)]
        strides.append(x.stride(2))
    out = Guarded((batch, query.shape[2], heads, query.shape[3]), query.dtype)
    shape = numbers(batch, heads, query.shape[2], key.shape[2], query.shape[3], *shared, *strides)
    zeros = (zero_points[0], zero_points[1], 0, zero_points[2])
    quantizers = (Affine * 4)(*(Affine(s, z) for s, z in zip(scales, zeros, strict=True)))
    narrow = int(query.dtype == torch.bfloat16)
    operands = [pointer(tensor) for tensor in (query, key, value)]
    library().integer_attention(narrow, *operands, out.pointer, shape, real(factor), quantizers)
    return out.value()
