"""What moves values without changing them; every size is a number by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openvino import opset15 as opset

from tfmq_fx.lowering.backends.openvino.elementwise import cast
from tfmq_fx.lowering.translation.aten import by_overload, per_side, reversed_axes, swapped_axes
from tfmq_fx.lowering.translation.translator import Operator, Translator

__all__ = ["OPERATORS"]


def reshape(context: Translator, input: Any, *_: Any, **__: Any) -> Any:
    """Whatever gives the values another shape in the same order."""
    value = context.value(input)
    if list(value.get_shape()) == context.shape:
        return value
    return opset.reshape(value, context.shape, special_zero=False).output(0)


def expand(context: Translator, input: Any, *_: Any, **__: Any) -> Any:
    """Repeat along axes of size 1."""
    value = context.value(input)
    if list(value.get_shape()) == context.shape:
        return value
    return opset.broadcast(value, context.shape).output(0)


def permute(context: Translator, input: Any, dims: Sequence[int]) -> Any:
    """Another order of the axes."""
    return opset.transpose(context.value(input), [axis % len(dims) for axis in dims]).output(0)


def transpose(context: Translator, input: Any, dim0: int, dim1: int) -> Any:
    """Two axes change places."""
    return permute(context, input, swapped_axes(len(context.shape), dim0, dim1))


def matrix_transpose(context: Translator, input: Any) -> Any:
    """The transpose of a matrix."""
    return permute(context, input, reversed_axes(len(context.shape)))


def cat(context: Translator, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Side by side along one axis."""
    return opset.concat([cast(context, tensor) for tensor in tensors], dim % len(context.shape)).output(0)


def stack(context: Translator, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Side by side along a new axis."""
    axis = dim % len(context.shape)
    return opset.concat([opset.unsqueeze(cast(context, tensor), [axis]) for tensor in tensors], axis).output(0)


def slice_(context: Translator, input: Any, dim: int = 0, start: int | None = None, end: int | None = None,
           step: int = 1) -> Any:  # fmt: skip
    """A part of one axis."""
    value = context.value(input)
    size = list(value.get_shape())[dim]
    first, last, _ = slice(start, end).indices(size)
    if (first, last, step) == (0, size, 1):
        return value
    return opset.slice(value, [first], [last], [step], [dim % len(context.shape)]).output(0)


def select(context: Translator, input: Any, dim: int, index: int) -> Any:
    """One place of an axis, which goes."""
    value = context.value(input)
    return opset.gather(value, index, dim % len(list(value.get_shape()))).output(0)


def index_select(context: Translator, input: Any, dim: int, index: Any) -> Any:
    """Rows of a table."""
    return opset.gather(context.value(input), context.value(index), dim).output(0)


def embedding(context: Translator, weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    """Rows of a table of embeddings."""
    return opset.gather(context.value(weight), context.value(indices), 0).output(0)


def split(context: Translator, input: Any, split_size: Any = None, dim: int = 0) -> list[Any]:
    """Parts of one axis."""
    value = context.value(input)
    axis = dim % len(list(value.get_shape()))
    lengths = [context.sizes(part.shape)[axis] for part in context.node.meta["val"]]
    return list(opset.variadic_split(value, axis, lengths).outputs())


def unbind(context: Translator, input: Any, dim: int = 0) -> list[Any]:
    """Every place of an axis by itself."""
    value = context.value(input)
    axis = dim % len(list(value.get_shape()))
    parts = opset.split(value, axis, list(value.get_shape())[axis]).outputs()
    return [opset.squeeze(part, [axis]).output(0) for part in parts]


def pad(context: Translator, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """A border; the sizes begin with the last axis."""
    begins, ends = per_side(pad, len(context.shape))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    return opset.pad(context.value(input), begins, ends, modes[mode], cast(context, value or 0.0)).output(0)


def constant_pad(context: Translator, input: Any, pad_: Sequence[int], value: float = 0.0) -> Any:
    """A border of one value."""
    return pad(context, input, pad_, "constant", value)


def repeat(context: Translator, input: Any, repeats: Sequence[int]) -> Any:
    """The whole several times."""
    return opset.tile(context.value(input), context.sizes(repeats)).output(0)


def repeat_interleave(context: Translator, input: Any, repeats: int, dim: int, **_: Any) -> Any:
    """Every place of an axis several times."""
    value = context.value(input)
    shape = list(value.get_shape())
    axis = dim % len(shape)
    wide = opset.unsqueeze(value, [axis + 1])
    many = opset.broadcast(wide, [*shape[: axis + 1], repeats, *shape[axis + 1 :]])
    return opset.reshape(many, context.shape, special_zero=False).output(0)


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
