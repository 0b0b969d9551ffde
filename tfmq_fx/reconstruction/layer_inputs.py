"""The rows that a layer multiplies by its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.passes.support.predicates import is_conv, is_linear

__all__ = ["grouped_weight", "input_position", "input_rows", "takes_rows"]

aten = torch.ops.aten

#: Numbers that are gathered at once.
MOST_NUMBERS = 2**25


def takes_rows(layer: fx.Node) -> bool:
    """Whether a layer is a linear or a (not transposed) convolution."""
    return is_linear(layer) or is_conv(layer)


def input_position(layer: fx.Node) -> int:
    """Where its input stands among its arguments."""
    return 1 if layer.target is aten.addmm.default else 0


def _windows(layer: fx.Node, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """What a convolution multiplies by its weight, ``[N, *out, C, *kernel]``: a view of the padded input."""
    spatial = len(kernel)

    def setting(position: int, default: int) -> list[int]:
        given: Any = layer.args[position] if position < len(layer.args) else default
        values = list(given) if isinstance(given, (list, tuple)) else [given]
        return [int(value) for value in (values * spatial if len(values) == 1 else values)]

    stride, padding, dilation = setting(3, 1), setting(4, 0), setting(5, 1)
    x = torch.nn.functional.pad(x, [side for amount in reversed(padding) for side in (amount, amount)])
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x.movedim(1, 1 + spatial)


def _groups(layer: fx.Node) -> int:
    position = 8 if layer.target is aten.convolution.default else 6
    groups: Any = layer.args[position] if is_conv(layer) and position < len(layer.args) else 1
    return int(groups)


def grouped_weight(layer: fx.Node, channels_first: Tensor) -> Tensor:
    """A weight with its output channels on axis 0, as ``[G, C, n]``: groups, channels of a group, input columns."""
    return channels_first.reshape(_groups(layer), -1, channels_first[0].numel())


def _matrix(layer: fx.Node, x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, int]:
    """The input with one row per entry of all axes but the last ``k``, as a view, and that number of axes."""
    if is_linear(layer):
        return x, x.ndim - 1
    view = _windows(layer, x, kernel)
    return view, 1 + len(kernel)


def input_rows(
    layer: fx.Node, inputs: tuple[Tensor, ...], kernel: tuple[int, ...], most: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """The rows of several inputs of one layer, of each the same, in pieces of bounded size.

    Args:
        layer: A linear, or a convolution of any number of spatial axes, stride, padding, dilation and groups.
        inputs: Its inputs, of one shape: ``[..., n]`` of a linear, ``[N, G c, ...]`` of a convolution.
        kernel: The spatial sizes of its weight; ``()`` for a linear.
        most: How many rows to take; a random choice where there are more.
        generator: Draws it.

    Yields:
        For each input float32 ``[G, r, n]``: its columns are the input channels of a group times the kernel's
        positions, as those of :func:`grouped_weight`.
    """
    views = [_matrix(layer, x, kernel) for x in inputs]
    axes = views[0][1]
    shape, columns = views[0][0].shape[:axes], views[0][0].shape[axes:].numel()
    count = shape.numel()
    chosen = torch.arange(count)
    if count > most:
        chosen = torch.randperm(count, generator=generator)[:most].sort().values
    piece = max(1, MOST_NUMBERS // columns)
    for start in range(0, len(chosen), piece):
        index = torch.unravel_index(chosen[start : start + piece], shape)
        rows = (view[index].to(torch.float32) for view, _ in views)
        yield tuple(row.reshape(len(row), _groups(layer), -1).movedim(1, 0).contiguous() for row in rows)
