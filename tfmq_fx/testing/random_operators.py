"""The operators of random graphs: what each kind adds to a graph that grows."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from .graph_growth import GraphGrowth, is_image, merges_last_axes, shape_of

__all__ = ["OPERATORS", "OperatorGrowth"]

aten = torch.ops.aten

#: The kinds of operators; the first ones are what failing examples shrink to.
OPERATORS = (
    "unary",
    "binary",
    "linear",
    "conv",
    "conv_of_concatenation",
    "conv_of_named_padding",
    "concatenation",
    "noop_cast",
    "identity",
    "dropout",
    "guard",
    "group_norm",
    "attention",
    "reshape",
    "transpose",
    "layout",
    "view",
    "unsqueeze",
    "mean",
    "chunk",
    "constant",
    "time",
    "cast",
    "scalar",
)

#: Products of more factors than this are not drawn: they would overflow.
MAX_DEGREE = 4


class OperatorGrowth(GraphGrowth):
    """A graph that grows by operators: each method adds one or a few nodes, or none when no value fits."""

    def unary(self) -> None:
        """An activation."""
        targets = [aten.silu.default, aten.relu.default, aten.gelu.default, aten.sin.default, aten.cos.default]
        if source := self._pick():
            self._call(self.draw(st.sampled_from(targets)), source)

    def scalar(self) -> None:
        """Arithmetic with a number."""
        targets = [aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor]
        if source := self._pick():
            self._call(self.draw(st.sampled_from(targets)), source, self.draw(st.sampled_from([2.0, -0.5, 3])))

    def binary(self) -> None:
        """A sum or a product of two values of one shape."""
        if left := self._pick():
            right = self._like(left)
            product = self.degree[left] + self.degree[right]
            if product <= MAX_DEGREE and self._flag():
                self._keep(self.builder.call(aten.mul.Tensor, left, right), product)
            else:
                self._call(aten.add.Tensor, left, right)

    def linear(self) -> None:
        """A linear layer."""
        if source := self._pick(lambda v: v.ndim >= 2 and v.dtype == torch.float32):
            width = self.draw(st.sampled_from([4, 1, 8]))
            self._weighted(aten.linear.default, source, self._weight(width, int(source.meta["val"].shape[-1])))

    def conv(self) -> None:
        """A two-dimensional convolution."""
        kernel = self.draw(st.sampled_from([1, 3]))
        padding, stride = self.draw(st.integers(0, 1)), self.draw(st.integers(1, 2))
        if source := self._pick(lambda v: is_image(v) and min(v.shape[2:]) >= kernel - 2 * padding):
            channels = int(source.meta["val"].shape[1])
            groups = self.draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
            weight = self._weight(2 * groups, channels // groups, kernel, kernel)
            options = ([stride, stride], [padding, padding], [1, 1], groups)
            plain = options == ([1, 1], [0, 0], [1, 1], 1)
            self._weighted(aten.conv2d.default, source, weight, *(() if plain else options))

    def concatenation(self) -> None:
        """A concatenation of two or three values."""
        if source := self._pick(lambda v: v.ndim >= 2):
            axis = self.draw(st.integers(1, source.meta["val"].ndim - 1))
            parts = [source, *(self._like(source) for _ in range(self.draw(st.integers(1, 2))))]
            self._call(aten.cat.default, parts, axis)

    def conv_of_concatenation(self) -> None:
        """A pointwise convolution of two images, concatenated along their channels."""
        first = self._pick(is_image)
        if first is None:
            return
        shape = shape_of(first.meta["val"])
        second = self._pick(lambda v: is_image(v) and (shape_of(v)[0], *shape_of(v)[2:]) == (shape[0], *shape[2:]))
        assert second is not None
        cat = self.builder.call(aten.cat.default, [first, second], self.draw(st.sampled_from([1, -3])))
        if self._flag():
            self._keep(cat)
        weight = self._weight(2, int(cat.meta["val"].shape[1]), 1, 1)
        self._weighted(aten.conv2d.default, cat, weight)

    def conv_of_named_padding(self) -> None:
        """A convolution whose padding is ``"same"`` or ``"valid"``."""
        kernel = [self.draw(st.sampled_from([2, 1, 3])) for _ in range(2)]
        if source := self._pick(
            lambda v: is_image(v) and all(a >= b for a, b in zip(v.shape[2:], kernel, strict=True))
        ):
            padding, dilation = self.draw(st.sampled_from([("same", 1), ("same", 2), ("valid", 1)]))
            weight = self._weight(2, int(source.meta["val"].shape[1]), *kernel)
            self._weighted(aten.conv2d.padding, source, weight, [1, 1], padding, [dilation, dilation])

    def noop_cast(self) -> None:
        """A cast, a copy or an alias that changes nothing."""
        if source := self._pick():
            dtype = source.meta["val"].dtype
            casts: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
                (aten.to.dtype, (dtype,), {}),
                (aten.alias.default, (), {}),
                (aten.detach.default, (), {}),
                (aten.contiguous.default, (), {}),
                (aten._to_copy.default, (), {"dtype": dtype}),
                (aten.to.dtype_layout, (), {"dtype": dtype, "layout": torch.strided}),
            ]
            target, args, kwargs = self.draw(st.sampled_from(casts))
            self._call(target, source, *args, **kwargs)

    def cast(self) -> None:
        """A cast to another dtype."""
        if self.half and (source := self._pick()):
            wide = source.meta["val"].dtype == torch.float32
            self._call(aten.to.dtype, source, torch.bfloat16 if wide else torch.float32)

    def identity(self) -> None:
        """Arithmetic by one."""
        if source := self._pick():
            self._call(self.draw(st.sampled_from([aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar])), source, 1)

    def dropout(self) -> None:
        """A dropout that does nothing."""
        if source := self._pick():
            self._call(aten.dropout.default, source, *self.draw(st.sampled_from([(0.0, True), (0.5, False)])))

    def guard(self) -> None:
        """An assertion about the metadata, the size or the elements of a value."""
        if source := self._pick():
            call = self.builder.call
            kind = self.draw(st.sampled_from(["metadata", "size", "elements"]))
            if kind == "metadata":
                call(aten._assert_tensor_metadata.default, source, None, None, source.meta["val"].dtype)
            elif kind == "size" and source.meta["val"].ndim:
                condition = call(operator.ge, call(aten.sym_size.int, source, 0), 1)
                call(aten._assert_scalar.default, condition, "the batch is empty")
            else:
                ones = call(aten.ones_like.default, source, dtype=torch.bool)
                call(aten._assert_async.msg, call(aten.all.default, ones), "not all")

    def group_norm(self) -> None:
        """A group norm."""
        if source := self._pick(lambda v: v.ndim >= 3 and v.dtype == torch.float32):
            channels = int(source.meta["val"].shape[1])
            groups = self.draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
            # A large epsilon, because a group of equal values must not turn rounding into a signal.
            self._call(aten.group_norm.default, source, groups, self._weight(channels), self._weight(channels), 0.1)

    def attention(self) -> None:
        """Fused attention."""
        if query := self._pick(lambda v: v.ndim >= 3 and v.dtype == torch.float32):
            key, value = self._like(query), self._like(query)
            length = int(query.meta["val"].shape[-2])
            options: dict[str, Any] = {}
            if self._flag():
                options["attn_mask"] = self._weight(length, length)
            if self._flag():
                options["scale"] = 0.5
            elif "attn_mask" not in options and self._flag():
                options["is_causal"] = True
            self._call(aten.scaled_dot_product_attention.default, query, key, value, **options)

    def reshape(self) -> None:
        """A reshape that merges axes."""
        if source := self._pick(lambda v: v.ndim >= 2):
            shape = [int(size) for size in source.meta["val"].shape[1:]]
            cut = self.draw(st.integers(0, len(shape)))
            merged = [math.prod(shape[:cut]), math.prod(shape[cut:])]
            self._call(aten.reshape.default, source, [-1, *merged])

    def transpose(self) -> None:
        """A transposition of two axes behind the batch."""
        if source := self._pick(lambda v: v.ndim >= 3):
            axes = st.integers(1, source.meta["val"].ndim - 1)
            self._call(aten.transpose.int, source, self.draw(axes), self.draw(axes))

    def layout(self) -> None:
        """An image or any other value with its channels last in memory, its shape as before."""
        if source := self._pick(lambda v: v.ndim >= 3):
            order = [0, *range(2, source.meta["val"].ndim), 1]
            if is_image(source.meta["val"]) and self._flag():
                self._call(aten.contiguous.default, source, memory_format=torch.channels_last)
                return
            permuted = self.builder.call(aten.permute.default, source, order)
            dense = self.builder.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
            self._call(aten.permute.default, dense, [order.index(axis) for axis in range(len(order))])

    def view(self) -> None:
        """What takes only some strides: it merges two axes that lie one behind the other."""
        if source := self._pick(merges_last_axes, settled=True):
            *outer, height, width = self._sizes(source)
            self._call(aten.view.default, source, [*outer, height * width])

    def unsqueeze(self) -> None:
        """A new axis."""
        if source := self._pick(lambda v: 1 <= v.ndim <= 3):
            self._call(aten.unsqueeze.default, source, self.draw(st.integers(1, source.meta["val"].ndim)))

    def mean(self) -> None:
        """The mean of the last axis."""
        if source := self._pick(lambda v: v.ndim >= 2):
            self._call(aten.mean.dim, source, [-1], True)

    def chunk(self) -> None:
        """Both halves of the second axis, or one."""
        if source := self._pick(lambda v: v.ndim >= 2 and v.shape[1] % 2 == 0):
            halves = self.builder.call(aten.chunk.default, source, 2, 1)
            for index in self.draw(st.sampled_from([(0, 1), (1,)])):
                self._call(operator.getitem, halves, index)

    def constant(self) -> None:
        """A sum with a constant."""
        if source := self._pick(lambda v: v.ndim >= 2 and v.dtype == torch.float32):
            self._call(aten.add.Tensor, source, self._weight(*(int(size) for size in source.meta["val"].shape[1:])))

    def time(self) -> None:
        """A small time path of its own: cast, column, frequencies, sine."""
        shape = [1, 1] if self.scalar_timestep else [-1, 1]
        column = self.builder.call(aten.to.dtype, self.timestep, torch.float32)
        column = self.builder.call(aten.reshape.default, column, shape)
        self._call(aten.sin.default, self.builder.call(aten.mul.Tensor, column, self._weight(4)))
