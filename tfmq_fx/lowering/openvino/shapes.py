"""What moves values without changing them; every size is a number by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from openvino import opset15 as opset

from tfmq_fx.lowering.openvino.elementwise import cast
from tfmq_fx.lowering.translation import Operator, Translator

__all__ = ["OPERATORS"]

aten = torch.ops.aten


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
    order = list(range(len(context.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(context, input, order)


def matrix_transpose(context: Translator, input: Any) -> Any:
    """The transpose of a matrix."""
    return permute(context, input, list(range(len(context.shape)))[::-1])


def cat(context: Translator, tensors: Sequence[Any], dim: int = 0) -> Any:
    """Side by side along one axis."""
    return opset.concat([cast(context, tensor) for tensor in tensors], dim % len(context.shape)).output(0)


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


def split(context: Translator, input: Any, split_size: Any, dim: int = 0) -> list[Any]:
    """Parts of one axis."""
    value = context.value(input)
    axis = dim % len(list(value.get_shape()))
    lengths = [context.sizes(part.shape)[axis] for part in context.node.meta["val"]]
    return list(opset.variadic_split(value, axis, lengths).outputs())


def chunk(context: Translator, input: Any, chunks: int, dim: int = 0) -> list[Any]:
    """Equal parts of one axis."""
    return split(context, input, None, dim)


def unbind(context: Translator, input: Any, dim: int = 0) -> list[Any]:
    """Every place of an axis by itself."""
    value = context.value(input)
    axis = dim % len(list(value.get_shape()))
    parts = opset.split(value, axis, list(value.get_shape())[axis]).outputs()
    return [opset.squeeze(part, [axis]).output(0) for part in parts]


def pad(context: Translator, input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """A border; the sizes begin with the last axis."""
    begins, ends = [0] * len(context.shape), [0] * len(context.shape)
    for axis in range(len(pad) // 2):
        begins[-1 - axis], ends[-1 - axis] = pad[2 * axis], pad[2 * axis + 1]
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


OPERATORS: Mapping[Any, Operator] = {
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.squeeze.default,
        ),
        reshape,
    ),
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: matrix_transpose,
    aten.cat.default: cat,
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.index_select.default: index_select,
    aten.embedding.default: embedding,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.chunk.default: chunk,
    aten.unbind.int: unbind,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
}
