"""Images as the integer kernels take them, and how to recognise them in a graph of channels-first operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tfmq_fx.passes.support.arguments import argument_list, argument_node, called_operator
from tfmq_fx.passes.support.byte_quantizers import ByteQuantizer, byte_quantizer
from tfmq_fx.passes.support.nodes import argument_of, insert_call
from tfmq_fx.passes.support.predicates import is_call, node_value

__all__ = [
    "FIRST",
    "LAST",
    "NONE",
    "RELABELLINGS",
    "Padding",
    "channel_factors",
    "channels_last_image",
    "flat_factors",
    "flattened_quantizers",
    "image_quantizers",
    "quantized_borders",
    "relabel",
    "scaled_border",
    "zero_border",
]

aten = torch.ops.aten
#: The permutations to channels last and back.
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
RELABELLINGS = (
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
#: top, left, bottom, right
Padding = tuple[int, int, int, int]
NONE: Padding = (0, 0, 0, 0)


def channels_last_image(graph: fx.Graph, node: fx.Node, anchor: fx.Node) -> fx.Node:
    """Insert ``node``, an image ``[N, C, H, W]`` or a sequence ``[N, C, L]``, as ``[N, H, W, C]``; ``H`` is 1 then."""
    if node_value(node).ndim == 4:
        return insert_call(graph, aten.permute.default, (node, LAST), anchor=anchor)
    transposed = insert_call(graph, aten.permute.default, (node, [0, 2, 1]), anchor=anchor)
    return insert_call(graph, aten.unsqueeze.default, (transposed, 1), anchor=anchor)


def quantized_borders(quantizer: ByteQuantizer) -> list[tuple[fx.Node, Padding]]:
    """What gives ``quantizer``'s image channels last, with the border each adds; ``[]`` if anything else reads it."""
    borders: list[tuple[fx.Node, Padding]] = []
    zero_point = None if quantizer.one is None else quantizer.one[1]
    for user in quantizer.node.users:
        if not is_call(user, aten.permute.default) or list(argument_list(user, 1)) != LAST:
            return []
        padded = [node for node in user.users if _is_border(node, zero_point)]
        for node in padded:
            border: Any = node.args[1]
            _, _, left, right, top, bottom = border
            borders.append((node, (top, left, bottom, right)))
        if len(padded) < len(user.users):
            borders.append((user, NONE))
    return borders


def _is_border(node: fx.Node, zero_point: int | None) -> bool:
    if zero_point is None or not is_call(node, aten.constant_pad_nd.default) or len(argument_list(node, 1)) != 6:
        return False
    border: Any = node.args[1]
    return bool(node.args[2] == zero_point and tuple(border[:2]) == (0, 0) and min(border) >= 0)


def zero_border(node: fx.Node) -> tuple[fx.Node, Padding]:
    """The image that ``node`` pads with zeros and by how much; ``node`` itself, by nothing, otherwise."""
    if is_call(node, aten.pad.default, aten.constant_pad_nd.default) and len(border := argument_list(node, 1)) == 4:
        operator = is_call(node, aten.pad.default)
        mode = argument_of(node, 2, "mode", "constant") if operator else "constant"
        value = argument_of(node, 3 if operator else 2, "value", None)
        if mode == "constant" and not value and min(border) >= 0:
            left, right, top, bottom = border
            return argument_node(node, 0), (top, left, bottom, right)
    return node, NONE


def channel_factors(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What ``node`` multiplies by a stored number for each channel, and the numbers; ``node`` and None otherwise.

    The channels are the second axis of an image, the last one of a list ``[rows, C]``.
    """
    if not is_call(node, aten.mul.Tensor) or node.kwargs:
        return node, None
    source, factors = node.args
    if not (isinstance(source, fx.Node) and isinstance(factors, fx.Node) and factors.op == "get_attr"):
        return node, None
    value, numbers = node_value(source), node_value(factors)
    if value.ndim not in (2, 4) or numbers.dtype != torch.float32:
        return node, None
    per_channel = list(numbers.shape) == [value.shape[1], *[1] * (value.ndim - 2)]
    return (source, factors) if per_channel else (node, None)


def flat_factors(graph: fx.Graph, factors: fx.Node | None, anchor: fx.Node) -> list[fx.Node]:
    """Insert the numbers of :func:`channel_factors` as ``[C]``; none where there are none."""
    return [] if factors is None else [insert_call(graph, aten.reshape.default, (factors, [-1]), anchor=anchor)]


def scaled_border(node: fx.Node) -> tuple[fx.Node, Padding, fx.Node | None]:
    """The image that ``node`` pads with zeros and scales channel by channel, in any order; the border; the factors.

    That is ``node`` itself, with no border and no factors, where it does neither. A zero stays one when it is scaled.
    """
    border, factors = NONE, None
    while True:
        source, more = zero_border(node)
        if source is node:
            source, found = channel_factors(node)
            if found is None or factors is not None:
                return node, border, factors
            factors = found
        node, border = source, _sum(border, more)


def image_quantizers(image: fx.Node) -> list[ByteQuantizer]:
    """The quantizers that read ``image``, behind borders of zeros and factors of its channels where there are any."""
    found: list[ByteQuantizer] = []
    pending = [image]
    while pending:
        node = pending.pop(0)
        for user in node.users:
            if (quantizer := byte_quantizer(user)) is not None:
                found += [quantizer] if scaled_border(argument_node(user, 0))[0] is image else []
            elif zero_border(user)[0] is node or channel_factors(user)[0] is node:
                pending.append(user)
    return found


def _sum(inner: Padding, outer: Padding) -> Padding:
    top, left, bottom, right = (a + b for a, b in zip(inner, outer, strict=True))
    return top, left, bottom, right


def _with_scaled(readers: Sequence[fx.Node], source: fx.Node) -> list[fx.Node]:
    """``readers`` of ``source``; those that scale its channels replaced by their own readers."""
    scaling = [reader for reader in readers if channel_factors(reader)[0] is source]
    return [reader for reader in readers if reader not in scaling] + [user for node in scaling for user in node.users]


def flattened_quantizers(norm: fx.Node) -> list[ByteQuantizer]:
    """The quantizers of ``norm``'s image as a list of pixels, ``[N * H * W, C]``, however it was reshaped to that."""
    quantizers: list[ByteQuantizer] = []
    pending = [(norm, [norm])]
    while pending:
        node, chain = pending.pop()
        for user in node.users:
            if is_call(user, *RELABELLINGS) and user.args[0] is node:
                pending.append((user, [*chain, user]))
                continue
            for reader in _with_scaled([user], node):
                if (found := byte_quantizer(reader)) is not None and len(chain) > 1:
                    quantizers += [found] if _flattens_pixels(chain) and _has_rows_of_images(found, norm) else []
    return quantizers


def _has_rows_of_images(quantizer: ByteQuantizer, image: fx.Node) -> bool:
    """Whether what quantizes pixels has no row of a table for less than one of the images they are of."""
    if quantizer.table is None:
        return True
    images, items = node_value(image).shape[0], node_value(quantizer.table.rows).shape[0]
    return statically_known_true(images % items == 0)


def relabel(value: Tensor, chain: Sequence[fx.Node]) -> Tensor | None:
    """Run the relabellings of ``chain`` on ``value``, with 2 for every symbolic size; None where they do not fit it."""
    for node in chain:
        rest = fx.node.map_arg(node.args[1:], lambda n: 2 if isinstance(node_value(n), torch.SymInt) else n)
        try:
            value = called_operator(node)(value, *rest, **node.kwargs)
        except (RuntimeError, TypeError):
            return None
    return value


def _flattens_pixels(chain: list[fx.Node]) -> bool:
    """Whether what is behind ``chain[0]`` turns ``[N, C, *space]`` to ``[N * space, C]``: tried with two images."""
    image = node_value(chain[0])
    if not all(isinstance(size, int) for size in image.shape[1:]):
        return False
    size = [2, *(int(size) for size in image.shape[1:])]
    value = torch.arange(torch.Size(size).numel(), dtype=torch.int32).reshape(size)
    relabelled = relabel(value, chain[1:])
    return relabelled is not None and torch.equal(relabelled, value.flatten(2).transpose(1, 2).reshape(-1, size[1]))
