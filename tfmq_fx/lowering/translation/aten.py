"""ATen's overloads by the name that engines translate them under, and arithmetic on their arguments.

Overloads of one name compute the same from arguments of the same names, so one translation serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["by_overload", "per_axis", "per_side", "reversed_axes", "swapped_axes"]

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed

#: Names that stand for ``aten.<name>.default`` are not listed.
OVERLOADS: Mapping[str, tuple[Any, ...]] = {
    "add": (aten.add.Tensor,),
    "average_pool": (aten.avg_pool2d.default,),
    "bitwise_and": (aten.bitwise_and.Tensor,),
    "cast": (aten.to.dtype, aten._to_copy.default),
    "cat": (aten.cat.default, aten.concat.default),
    "clamp": (aten.clamp.default, aten.clamp_min.default),
    "constant_pad": (aten.constant_pad_nd.default,),
    "conv": (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    "dequantize": (decomposed.dequantize_per_tensor.default, decomposed.dequantize_per_tensor.tensor),
    "dequantize_weight": (decomposed.dequantize_per_channel.default,),
    "div": (aten.div.Tensor,),
    "eq": (aten.eq.Scalar, aten.eq.Tensor),
    "expand": (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default),
    "ge": (aten.ge.Scalar,),
    "gt": (aten.gt.Scalar,),
    "le": (aten.le.Scalar, aten.le.Tensor),
    "lt": (aten.lt.Scalar,),
    "matmul": (aten.matmul.default, aten.bmm.default),
    "mean": (aten.mean.dim,),
    "mul": (aten.mul.Tensor, aten.mul.Scalar),
    "pow": (aten.pow.Tensor_Scalar,),
    "quantize": (decomposed.quantize_per_tensor.default, decomposed.quantize_per_tensor.tensor),
    "repeat_interleave": (aten.repeat_interleave.self_int,),
    "reshape": (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.view_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
    ),
    "same": (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default),
    "select": (aten.select.int,),
    "slice": (aten.slice.Tensor,),
    "softmax": (aten.softmax.int, aten._softmax.default),
    "split": (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    "sub": (aten.sub.Tensor,),
    "sum": (aten.sum.dim_IntList,),
    "transpose": (aten.transpose.int,),
    "unbind": (aten.unbind.int,),
    "upsample_nearest": (
        aten.upsample_nearest1d.vec,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest3d.vec,
    ),
    "where": (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
}


def by_overload(translations: Mapping[str, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Translations by overload instead of by name.

    Raises:
        AttributeError: ATen has no operator of a name.
    """
    return {
        overload: translate
        for name, translate in translations.items()
        for overload in (OVERLOADS[name] if name in OVERLOADS else (getattr(aten, name).default,))
    }


def per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """A number for each axis of an image, from one number for all of them or a list."""
    return [value] * axes if isinstance(value, int) else list(value) * (axes // len(value))


def per_side(pad: Sequence[int], rank: int) -> tuple[list[int], list[int]]:
    """Sizes of a border at the beginning and at the end of every axis; ``pad`` begins with the last axis."""
    begins, ends = [0] * rank, [0] * rank
    for axis in range(len(pad) // 2):
        begins[-1 - axis], ends[-1 - axis] = pad[2 * axis], pad[2 * axis + 1]
    return begins, ends


def swapped_axes(rank: int, dim0: int, dim1: int) -> list[int]:
    """The order of the axes after two of them change places."""
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return order


def reversed_axes(rank: int) -> list[int]:
    """The axes from the last to the first."""
    return list(range(rank))[::-1]
