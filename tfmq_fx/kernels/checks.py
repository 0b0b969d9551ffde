"""What the integer kernels take: they get pointers and sizes, so a wrong argument has to be an error before that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tfmq_fx._torch.processor import has_amx_tiles, has_vnni
from tfmq_fx.errors import LoweringError
from tfmq_fx.kernels.packing import DEPTH, LANES

__all__ = [
    "MAX_BYTE_PRODUCTS",
    "MAX_SIGNED_PRODUCTS",
    "MAX_TAPS",
    "MOST_WORD",
    "check_attention",
    "check_conv",
    "check_image",
    "check_norm",
    "check_pointwise",
    "common_size",
    "has_native_kernels",
    "weights_fit",
]

FLOATS = (torch.float32, torch.bfloat16)
#: Offsets of a kernel's places, for which the convolution has a table of this length.
MAX_TAPS = 64
#: The largest integers of 8 and of 16 bits.
MOST_BYTE, MOST_WORD = 2**8 - 1, 2**16 - 1
#: How many products an int32 holds the sum of: of a byte and a signed byte, and of two bytes less their zero points.
MAX_SIGNED_PRODUCTS, MAX_BYTE_PRODUCTS = (2**31 - 1) // (255 * 128), (2**31 - 1) // (255 * 255)


@functools.cache
def has_native_kernels() -> bool:
    """Whether this machine's processor should run the kernels: it has AVX-512 with VNNI.

    One with AMX should not: oneDNN's kernels use its tiles, which multiply several times as many bytes a cycle.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX512" and has_vnni() and not has_amx_tiles()


def weights_fit(keys: int, scale: float, deferred: bool) -> bool:
    """Whether an int32 holds what ``keys`` bytes of a softmax, in steps of ``scale``, add up to with any values.

    The bytes of one query are no more than 255 each, and where they were divided by their sum, no more than 1 in all
    but for rounding each by half a step; the doubled terms leave room for the rounding of the softmax itself.
    """
    return keys <= MAX_BYTE_PRODUCTS or (not deferred and 2 / scale + keys <= (2**31 - 1) // 255)


def _require(holds: bool, operator: str, problem: str) -> None:
    if not holds:
        msg = f"tfmq::{operator} cannot take its arguments: {problem}"
        raise LoweringError(msg)


def _same_size(one: Any, other: Any) -> bool:
    """Whether two sizes may be the same: False only where that is certain, whatever a symbol stands for."""
    return not statically_known_true(one != other)


def _at_least(size: Any, least: int) -> bool:
    return not statically_known_true(size < least)


def common_size(sizes: Sequence[Any]) -> Any:
    """The size that ``sizes`` are broadcast to: the one that is not 1, or None where they disagree."""
    actual_sizes = [size for size in sizes if not statically_known_true(size == 1)]
    return None if any(not _same_size(size, actual_sizes[0]) for size in actual_sizes) else next(iter(actual_sizes), 1)


def _check_affine(operator: str, scales: Sequence[float], zero_points: Sequence[int], most: int = MOST_BYTE) -> None:
    for scale in scales:
        _require(0.0 < scale < float("inf"), operator, f"a scale is {scale}, where a positive finite number is needed")
    for zero in zero_points:
        kind = "byte" if most == MOST_BYTE else f"number from 0 to {most}"
        _require(0 <= zero <= most, operator, f"the zero point {zero} is no {kind}")


def _check_constant(operator: str, name: str, value: Tensor, channels: int) -> None:
    fits = list(value.shape) == [channels] and value.dtype == torch.float32
    _require(fits, operator, f"{name} is {value.dtype} {list(value.shape)}, not float32 [{channels}]")


def _check_image(operator: str, x: Tensor, dtypes: Sequence[torch.dtype], vector: int) -> None:
    _require(x.ndim == 4, operator, f"an image has {x.ndim} axes, where [N, H, W, C] is needed")
    _require(x.dtype in dtypes, operator, f"an image is {x.dtype}, not {' or '.join(str(d) for d in dtypes)}")
    filled = all(_at_least(size, 1) for size in x.shape[1:])
    _require(filled, operator, f"an image of {list(x.shape[1:])} has no pixels")
    whole = x.shape[3] % vector == 0
    _require(whole, operator, f"an image has {x.shape[3]} channels, which is no multiple of {vector}")


def check_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Raise LoweringError for arguments of ``integer_conv`` that its kernel would read or write wrongly."""
    _check_image("integer_conv", x, (torch.uint8,), DEPTH)
    _check_products("integer_conv", x, weight, (scale, bias), residual, kernel, stride, dtype)


def _check_products(
    name: str,
    x: Tensor,
    weight: Tensor,
    constants: tuple[Tensor, Tensor],
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """What a convolution's kernel takes beside its image: the weight, scale and bias, what is added."""
    depth, taps = x.shape[3], kernel[0] * kernel[1]
    packed = weight.ndim == 5 and weight.dtype == torch.int8
    expected = [taps, depth // DEPTH, DEPTH]
    packed = packed and [weight.shape[1], weight.shape[2], weight.shape[4]] == expected
    _require(
        packed and weight.shape[3] in (LANES, 2 * LANES, 3 * LANES, 4 * LANES),
        name,
        f"the weight is {weight.dtype} {list(weight.shape)}, not one packed for {depth} channels and {taps} taps",
    )
    _require(1 <= taps <= MAX_TAPS, name, f"the kernel has {taps} taps, where 1 to {MAX_TAPS} are possible")
    _require(depth * taps <= MAX_SIGNED_PRODUCTS, name, f"an int32 cannot hold the sum of {depth * taps} products")
    _require(min(stride) >= 1, name, f"the stride is {list(stride)}")
    room = all(_at_least(size, k) for size, k in zip(x.shape[1:3], kernel, strict=True))
    _require(room, name, f"a kernel of {list(kernel)} does not fit into {list(x.shape[1:3])}")
    channels = weight.shape[0] * weight.shape[3]
    for label, value in zip(("scale", "bias"), constants, strict=True):
        _check_constant(name, label, value, channels)
    _require(dtype in FLOATS, name, f"the result cannot be {dtype}")
    if residual is not None:
        size = [x.shape[0], *((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], kernel, stride, strict=True)), channels]
        fits = residual.dtype == dtype and residual.ndim == 4
        fits = fits and all(_same_size(a, b) for a, b in zip(residual.shape, size, strict=True))
        _require(fits, name, f"the residual is {residual.dtype} {list(residual.shape)}, not {dtype} {size}")


def check_pointwise(
    x: Tensor,
    weight: Tensor,
    constants: tuple[Tensor, Tensor, Tensor],
    residual: Tensor | None,
    scale: float,
    zero_point: int,
    dtype: torch.dtype,
    factors: Tensor | None,
) -> None:
    """Raise LoweringError for arguments of ``integer_pointwise_conv`` that its kernel would read or write wrongly."""
    name, (weight_scale, sums, bias) = "integer_pointwise_conv", constants
    _check_image(name, x, FLOATS, LANES)
    _check_products(name, x, weight, (weight_scale, bias), residual, (1, 1), (1, 1), dtype)
    fits = sums.dtype == torch.int32 and sums.shape == weight_scale.shape
    _require(fits, name, f"the sums are {sums.dtype} {list(sums.shape)}, not int32 {list(weight_scale.shape)}")
    _check_affine(name, (scale,), (zero_point,), MOST_WORD)
    if factors is not None:
        _check_constant(name, "factors", factors, x.shape[3])


def check_norm(
    operator: str, x: Sequence[Tensor], shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int
) -> None:
    """Raise LoweringError for arguments of ``group_norm`` that its kernel would read or write wrongly."""
    _require(len(x) in (1, 2), operator, f"there are {len(x)} images, where 1 or 2 are possible")
    for part in x:
        _check_image(operator, part, FLOATS, LANES)
        alike = part.dtype == x[0].dtype and all(
            _same_size(a, b) for a, b in zip(part.shape[:3], x[0].shape[:3], strict=True)
        )
        _require(alike, operator, "the two images differ in dtype or size")
    channels = sum(part.shape[3] for part in x)
    _require(groups >= 1 and channels % groups == 0, operator, f"{channels} channels do not make {groups} groups")
    for label, value in (("weight", weight), ("bias", bias)):
        _check_constant(operator, label, value, channels)
    if shift is not None:
        fits = shift.dtype == torch.float32 and shift.ndim == 2 and shift.shape[1] == channels
        fits = fits and common_size((shift.shape[0], x[0].shape[0])) is not None
        fits = fits and (statically_known_true(shift.shape[0] == 1) or _same_size(shift.shape[0], x[0].shape[0]))
        expected = f"float32 [{x[0].shape[0]} or 1, {channels}]"
        _require(fits, operator, f"the shift is {shift.dtype} {list(shift.shape)}, not {expected}")


def check_image(
    operator: str,
    x: Sequence[Tensor],
    enlarge: int,
    scale: float,
    zero_point: int,
    padding: Sequence[int],
    factors: Tensor | None,
) -> None:
    """Raise LoweringError for what scales, quantizes, enlarges and pads ``x`` where a kernel would do it wrongly."""
    for part in x:
        _check_image(operator, part, FLOATS, LANES)
    _require(enlarge >= 1, operator, f"an image cannot be enlarged {enlarge} times")
    _require(len(padding) == 4 and min(padding) >= 0, operator, f"the padding is {list(padding)}")
    _check_affine(operator, (scale,), (zero_point,))
    if factors is not None:
        _check_constant(operator, "factors", factors, sum(part.shape[3] for part in x))


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, scales: Sequence[float], zero_points: Sequence[int], deferred: bool
) -> None:
    """Raise LoweringError for arguments of ``integer_attention`` that its kernel would read or write wrongly."""
    name, operands = "integer_attention", (query, key, value)
    shapes = " and ".join(str(list(operand.shape)) for operand in operands)
    _require(all(operand.ndim == 4 for operand in operands), name, f"{shapes} are not [N, heads, rows, depth] each")
    dtypes = {operand.dtype for operand in operands}
    _require(len(dtypes) == 1 and query.dtype in FLOATS, name, f"its inputs are {', '.join(map(str, dtypes))}")
    depth = query.shape[3]
    _require(all(_same_size(x.shape[3], depth) for x in operands), name, f"{shapes} differ in their last axis")
    _require(depth % DEPTH == 0 and depth > 0, name, f"a depth of {depth} is no multiple of {DEPTH}")
    _require(depth <= MAX_BYTE_PRODUCTS, name, f"an int32 cannot hold the sum of {depth} products")
    same = _same_size(key.shape[2], value.shape[2]) and _at_least(key.shape[2], 1)
    _require(same, name, f"{shapes} have no or unlike numbers of keys and values")
    _require(common_size([x.shape[0] for x in operands]) is not None, name, f"{shapes} differ in their batch")
    shared = common_size((key.shape[1], value.shape[1]))
    fits = shared is not None and shared > 0 and (query.shape[1] == 1 or query.shape[1] % shared == 0)
    _require(fits, name, f"the heads of {shapes} do not divide each other")
    _require(len(scales) == 4 and len(zero_points) == 3, name, "it needs four scales and three zero points")
    _check_affine(name, scales, zero_points)
    if isinstance(key.shape[2], int):
        fits = weights_fit(key.shape[2], scales[2], deferred)
        _require(fits, name, f"an int32 cannot hold the sum of {key.shape[2]} products")
