"""What moves values without changing them; every size is a number by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tfmq_fx.lowering.backends.onnxruntime.context import OnnxContext
from tfmq_fx.lowering.translation.aten import by_overload, per_side, reversed_axes, swapped_axes
from tfmq_fx.lowering.translation.translator import Operator

__all__ = ["OPERATORS"]


def reshape(context: OnnxContext, input: Any, *_: Any, **__: Any) -> Any:
    """Whatever gives the values another shape in the same order."""
    value = context.value(input)
    if list(value.shape) == context.shape:
        return value
    return context.result("Reshape", [value, context.builder.sizes(context.shape)])


def expand(context: OnnxContext, input: Any, *_: Any, **__: Any) -> Any:
    """Repeat along axes of size 1."""
    value = context.value(input)
    if list(value.shape) == context.shape:
        return value
    return context.result("Expand", [value, context.builder.sizes(context.shape)])


def permute(context: OnnxContext, input: Any, dims: Sequence[int]) -> Any:
    """Another order of the axes."""
    return context.result("Transpose", [context.value(input)], perm=[axis % len(dims) for axis in dims])


def transpose(context: OnnxContext, input: Any, dim0: int, dim1: int) -> Any:
    """Two axes change places."""
    return permute(context, input, swapped_axes(len(context.shape), dim0, dim1))


def matrix_transpose(context: OnnxContext, input: Any) -> Any:
    """The transpose of a matrix."""
    return permute(context, input, reversed_axes(len(context.shape)))


def cat(context: OnnxContext, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Side by side along one axis."""
    return context.result("Concat", [context.cast(tensor) for tensor in tensors], axis=dim)


def stack(context: OnnxContext, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Side by side along a new axis."""
    place = context.builder.sizes([dim])
    shape = list(context.shape)
    shape[dim] = 1
    wide = [context.emit("Unsqueeze", [context.cast(t), place], shape, context.dtype) for t in tensors]
    return context.result("Concat", wide, axis=dim)


def slice_(context: OnnxContext, input: Any, dim: int = 0, start: int | None = None, end: int | None = None,
           step: int = 1) -> Any:  # fmt: skip
    """A part of one axis."""
    value = context.value(input)
    first, last, _ = slice(start, end).indices(value.shape[dim])
    if (first, last, step) == (0, value.shape[dim], 1):
        return value
    return context.result("Slice", [value, *(context.builder.sizes([number]) for number in (first, last, dim, step))])


def select(context: OnnxContext, input: Any, dim: int, index: int) -> Any:
    """One place of an axis, which goes."""
    return context.result("Gather", [context.value(input), context.constant(torch.tensor(index))], axis=dim)


def index_select(context: OnnxContext, input: Any, dim: int, index: Any) -> Any:
    """Rows of a table."""
    return context.result("Gather", [context.value(input), context.value(index)], axis=dim)


def embedding(context: OnnxContext, weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    """Rows of a table of embeddings."""
    return index_select(context, weight, 0, indices)


def split(context: OnnxContext, input: Any, split_size: Any = None, dim: int = 0) -> list[Any]:
    """Parts of one axis."""
    value = context.value(input)
    shapes = [tuple(context.sizes(part.shape)) for part in context.node.meta["val"]]
    lengths = context.builder.sizes([shape[dim] for shape in shapes])
    return context.builder.emit_several("Split", [value, lengths], shapes, value.dtype, axis=dim)


def unbind(context: OnnxContext, input: Any, dim: int = 0) -> list[Any]:
    """Every place of an axis by itself."""
    value = context.value(input)
    shape = list(value.shape)
    del shape[dim]
    places = [context.constant(torch.tensor(index)) for index in range(value.shape[dim])]
    return [context.emit("Gather", [value, place], shape, value.dtype, axis=dim) for place in places]


def pad(
    context: OnnxContext, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    """A border; the sizes begin with the last axis."""
    begins, ends = per_side(pad, len(context.shape))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    filling = context.cast(value or 0.0)
    return context.result(
        "Pad", [context.value(input), context.builder.sizes([*begins, *ends]), filling], mode=modes[mode]
    )


def constant_pad(context: OnnxContext, input: Any, pad_: Sequence[int], value: float = 0.0) -> Any:
    """A border of one value."""
    return pad(context, input, pad_, "constant", value)


def repeat(context: OnnxContext, input: Any, repeats: Sequence[int]) -> Any:
    """The whole several times."""
    value = context.value(input)
    missing = [1] * (len(repeats) - len(value.shape))
    if missing:
        shape = [*missing, *value.shape]
        value = context.emit("Reshape", [value, context.builder.sizes(shape)], shape, value.dtype)
    return context.result("Tile", [value, context.builder.sizes(context.sizes(repeats))])


def repeat_interleave(context: OnnxContext, input: Any, repeats: int, dim: int, **_: Any) -> Any:
    """Every place of an axis several times."""
    value = context.value(input)
    axis = dim % len(value.shape)
    shape = [*value.shape[: axis + 1], 1, *value.shape[axis + 1 :]]
    wide = context.emit("Reshape", [value, context.builder.sizes(shape)], shape, value.dtype)
    shape[axis + 1] = repeats
    many = context.emit("Expand", [wide, context.builder.sizes(shape)], shape, value.dtype)
    return context.result("Reshape", [many, context.builder.sizes(context.shape)])


OPERATORS: Mapping[Any, Operator] = by_overload(
    {
        "cat": cat,
        "constant_pad": constant_pad,
        "embedding": embedding,
        "expand": expand,
        "index_select": index_select,
        "pad": pad,
        "permute": permute,
        "repeat": repeat,
        "repeat_interleave": repeat_interleave,
        "reshape": reshape,
        "select": select,
        "slice": slice_,
        "split": split,
        "stack": stack,
        "t": matrix_transpose,
        "transpose": transpose,
        "unbind": unbind,
    }
)
