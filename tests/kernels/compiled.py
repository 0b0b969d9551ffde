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


class Quantizers(ctypes.Structure):
    """A table and the row of each item, or one row for all."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scales", "zero_points", "rows")),
        ("table", ctypes.c_int64),
        ("images_per_item", ctypes.c_int64),
    )

    @classmethod
    def of(cls, scales, zero_points, rows, images):
        """``scales`` and ``zero_points``: tensors of a table where ``rows`` is one, else lists of one row."""
        scales = torch.as_tensor(scales, dtype=torch.float32)
        zero_points = torch.as_tensor(zero_points, dtype=torch.int64)
        table, each = (1, 1) if rows is None else (len(scales), images // len(rows))
        made = cls(pointer(scales), pointer(zero_points), pointer(rows), table, each)
        made.kept = (scales, zero_points, rows)
        return made


def integer_conv(x, weight, scale, bias, residual, kernel, stride, dtype, *, threads=1, table=None, weight_sum=None):
    """``table``: scales, zero points and rows; ``scale`` is then the weight's, and ``weight_sum`` needed."""
    library().threads(threads)
    batch, height, width, depth = x.shape
    rows, columns = ((n - k) // s + 1 for n, k, s in zip((height, width), kernel, stride, strict=True))
    out = Guarded((batch, rows, columns, scale.numel()), dtype)
    shape = numbers(batch, height, width, depth, rows, columns, scale.numel(), *kernel, *stride)
    operands = [pointer(tensor) for tensor in (x, weight, scale, weight_sum, bias, residual)]
    narrow, vectors = int(dtype == torch.bfloat16), weight.shape[3] // 16
    quantizers = None if table is None else ctypes.byref(Quantizers.of(*table, batch))
    library().integer_conv(narrow, vectors, *operands, out.pointer, shape, quantizers)
    return out.value()


def group_norm(
    x,
    shift,
    weight,
    bias,
    groups,
    eps,
    silu,
    quantizer=None,
    padding=(0, 0, 0, 0),
    factors=None,
    *,
    threads=1,
    rows=None,
):
    """``quantizer``: a scale and a zero point; the tensors of a table where there are ``rows``."""
    library().threads(threads)
    batch, height, width = x[0].shape[:3]
    counts = [part.shape[3] for part in x] + [0] * (2 - len(x))
    top, left, bottom, right = padding
    size = (batch, height + top + bottom, width + left + right, sum(counts))
    out = Guarded(size, torch.float32 if quantizer is None else torch.uint8)
    pitch = 0 if shift is None or shift.shape[0] == 1 else shift.stride(0)
    shape = numbers(batch, height, width, groups, *counts, *padding, pitch)
    scale, zero = ([1.0], [0]) if quantizer is None else quantizer
    by = Quantizers.of(*((scale, zero) if rows is not None or quantizer is None else ([scale], [zero])), rows, batch)
    operands = [pointer(tensor) for tensor in (x[0], x[1] if len(x) > 1 else None, shift, weight, bias, factors)]
    kind = (int(x[0].dtype == torch.bfloat16), int(quantizer is not None), int(silu))
    library().group_norm(*kind, *operands, out.pointer, shape, real(eps), ctypes.byref(by))
    return out.value()


def quantized_image(x, enlarge, scale, zero_point, padding, factors=None, *, threads=1, rows=None):
    """``scale`` and ``zero_point``: the tensors of a table where there are ``rows``."""
    library().threads(threads)
    batch, height, width, channels = x.shape
    top, left, bottom, right = padding
    out = Guarded((batch, height * enlarge + top + bottom, width * enlarge + left + right, channels), torch.uint8)
    shape = numbers(*x.shape, enlarge, *padding)
    by = Quantizers.of(*((scale, zero_point) if rows is not None else ([scale], [zero_point])), rows, batch)
    narrow = int(x.dtype == torch.bfloat16)
    library().quantize_image(narrow, pointer(x), pointer(factors), out.pointer, shape, ctypes.byref(by))
    return out.value()


def pointwise_conv(
    x, weight, weight_scale, weight_sum, bias, residual, scale, zero_point, factors=None, *, threads=1, rows=None
):
    """As the operator; the result has the type of ``x``. A table of tensors where there are ``rows``."""
    library().threads(threads)
    batch, height, width, depth = x.shape
    out = Guarded((batch, height, width, weight_scale.numel()), x.dtype)
    shape = numbers(batch, height * width, depth, weight_scale.numel())
    by = Quantizers.of(*((scale, zero_point) if rows is not None else ([scale], [zero_point])), rows, batch)
    operands = [pointer(tensor) for tensor in (x, factors, weight, weight_scale, weight_sum, bias, residual)]
    kind = (int(x.dtype == torch.bfloat16), weight.shape[3] // 16)
    library().pointwise_conv(*kind, *operands, out.pointer, shape, ctypes.byref(by))
    return out.value()


def integer_attention(query, key, value, factor, scales, zero_points, *, threads=1, rows=None, deferred=False):
    """``scales`` of four and ``zero_points`` of three; tables ``[rows, 4]`` of both where there are ``rows``."""
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
    zeros = zero_points if rows is not None else (zero_points[0], zero_points[1], 0, zero_points[2])
    by = Quantizers.of(scales, zeros, rows, batch)
    narrow = int(query.dtype == torch.bfloat16)
    operands = [pointer(tensor) for tensor in (query, key, value)]
    library().integer_attention(narrow, *operands, out.pointer, shape, real(factor), ctypes.byref(by), int(deferred))
    return out.value()
