"""Normalize, activate and quantize an image in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, fx

from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_list, argument_node
from tfmq_fx.passes.support.byte_quantizers import ByteQuantizer
from tfmq_fx.passes.support.channels_last import (
    FIRST,
    NONE,
    channels_last_image,
    flat_factors,
    flattened_quantizers,
    image_quantizers,
    quantized_borders,
    scaled_border,
)
from tfmq_fx.passes.support.nodes import insert_call, replace_node
from tfmq_fx.passes.support.predicates import is_call, node_value
from tfmq_fx.passes.support.sizes import is_same_size

__all__ = ["FuseGroupNorms"]

aten = torch.ops.aten
#: The kernel walks channels by vectors of this many.
CHANNELS = 16


@dataclass(frozen=True)
class Normalization:
    """A GroupNorm and what belongs to it: parts of its input, what was added to each channel, its last node."""

    node: fx.Node
    parts: tuple[fx.Node, ...]
    shift: fx.Node | None
    silu: bool
    last: fx.Node


def _is_shift(node: Any, image: Tensor) -> TypeGuard[fx.Node]:
    """Whether ``node`` holds one number per channel, for each image or for all."""
    value = node_value(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.ndim != 4 or value.dtype != torch.float32:
        return False
    items, channels, *rest = value.shape
    per_item = is_same_size(items, 1) or is_same_size(items, image.shape[0])
    return rest == [1, 1] and channels == image.shape[1] and per_item


def _is_constant(node: Any, channels: int) -> bool:
    """Whether ``node`` is what the kernel reads as one float32 per channel."""
    value = node_value(node) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float32 and list(value.shape) == [channels]


def find_normalization(node: fx.Node) -> Normalization | None:
    """``node`` as a GroupNorm that the kernel covers, with everything around it that can go along."""
    if not is_call(node, aten.group_norm.default) or len(node.args) < 4:
        return None
    image, source = node_value(node), argument_node(node, 0)
    if image.ndim not in (3, 4) or image.dtype != torch.float32 or node_value(source).dtype != torch.float32:
        return None
    channels = int(image.shape[1])
    if channels % CHANNELS or not all(_is_constant(constant, channels) for constant in node.args[2:4]):
        return None
    if any(is_same_size(size, 0) for size in image.shape):  # no pixel to start the statistics from
        return None
    shift: fx.Node | None = None
    if is_call(source, aten.add.Tensor) and len(source.users) == 1 and not source.kwargs:
        left, right = source.args
        for summand, moved in ((left, right), (right, left)):
            if isinstance(summand, fx.Node) and _is_shift(moved, image) and node_value(summand).shape == image.shape:
                source, shift = summand, moved
                break
    parts: tuple[fx.Node, ...] = (source,)
    if is_call(source, aten.cat.default) and image.ndim == 4 and source.args[1:] == (1,):
        joined = tuple(argument_list(source, 0))
        if len(joined) == 2 and all(int(node_value(part).shape[1]) % CHANNELS == 0 for part in joined):
            parts = joined
    users = list(node.users)
    silu = len(users) == 1 and is_call(users[0], aten.silu.default)
    return Normalization(node, parts, shift, silu, users[0] if silu else node)


def _erase_unread(graph: fx.Graph, node: fx.Node, first: fx.Node) -> None:
    """Erase ``node`` and what led to it from ``kept`` on, as far as nothing reads it any more."""
    while node is not first and not node.users:
        source: Any = node.args[0]
        graph.erase_node(node)
        node = source


class FuseGroupNorms(GraphPass):
    """Replace GroupNorm, with SiLU and quantization behind it where they follow, by one kernel.

    Before::

        %c = cat([%a, %b], 1)      %s = add(%c, %shift)             # %shift: [N, C, 1, 1]; both where they are
        %g = group_norm(%s, G, %w, %v, eps)      %u = silu(%g)      %q = quantize_per_tensor(%u, s, z, …)
        %l = permute(%q, [0, 2, 3, 1])      %p = constant_pad_nd(%l, [0, 0, w, w, h, h], z)

    After::

        %t = reshape(%shift, [-1, C])
        %p = tfmq.quantized_group_norm([permute(%a), permute(%b)], %t, %w, %v, G, eps, True, s, z, …)

    Where nothing quantizes, ``tfmq.group_norm`` yields floats; where the channels-last pixels ``[N * L, C]`` of a norm
    are quantized, as attention does, these are the result. A border of zeros before the quantizer goes along, and so do
    stored factors of the channels, ``mul(%u, %f)``: they are the last argument then. Where each item has a row of a
    table, ``quantized_group_norm.rows`` takes the table and the rows.

    Legality: the definition of the four operators; a shift of a channel moves its mean and leaves its variance.
    Channels are a multiple of 16 in each part. Numerics are preserved up to the order of float sums, which may turn a
    rounding.
    Meta: the new nodes take the module stack of the norm.
    """

    id: ClassVar[str] = "tfmq::fuse_group_norms"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Fuse around every GroupNorm that the kernel covers."""
        graph, modified = graph_module.graph, False
        for node in list(graph.nodes):
            norm = find_normalization(node)
            if norm is not None:
                self._fuse(graph, norm)
                modified = True
        if modified:
            graph.eliminate_dead_code()
        return modified

    def _fuse(self, graph: fx.Graph, norm: Normalization) -> None:
        arguments = self._arguments(graph, norm)
        channels = int(node_value(norm.node).shape[1])
        images = image_quantizers(norm.last) if node_value(norm.node).ndim == 4 else []
        for quantizer in images:
            _, inner, _ = scaled_border(argument_node(quantizer.node, 0))
            for reader, outer in quantized_borders(quantizer):
                source: Any = reader.args[0]
                padding = tuple(a + b for a, b in zip(inner, outer, strict=True))
                replace_node(reader, self._quantized(graph, norm, arguments, quantizer, padding))
                _erase_unread(graph, source, norm.last)
        for quantizer in flattened_quantizers(norm.last):
            image = self._quantized(graph, norm, arguments, quantizer, NONE)
            with graph.inserting_after(image):
                pixels = insert_call(graph, aten.reshape.default, (image, [-1, channels]), anchor=norm.node)
            source = quantizer.node.args[0]
            replace_node(quantizer.node, pixels)
            _erase_unread(graph, source, norm.last)
        if norm.last.users:
            self._replace_floats(graph, norm, arguments)

    def _arguments(self, graph: fx.Graph, norm: Normalization) -> tuple[Any, ...]:
        """The arguments of the kernel that do not depend on who reads its result."""
        _, groups, weight, bias, *eps = norm.node.args[:5]
        shift = norm.shift
        with graph.inserting_before(norm.node):
            parts = [channels_last_image(graph, part, norm.node) for part in norm.parts]
            if shift is not None:
                shape = [-1, int(node_value(shift).shape[1])]
                shift = insert_call(graph, aten.reshape.default, (shift, shape), anchor=norm.node)
        return parts, shift, weight, bias, groups, eps[0] if eps else 1e-5, norm.silu

    def _quantized(
        self,
        graph: fx.Graph,
        norm: Normalization,
        arguments: tuple[Any, ...],
        quantizer: ByteQuantizer,
        padding: Sequence[int],
    ) -> fx.Node:
        """Insert the kernel that quantizes as ``quantizer`` does, where all that it reads is there."""
        operator = OPERATORS.quantized_group_norm
        chosen = operator.default if quantizer.table is None else operator.rows
        _, _, factors = scaled_border(argument_node(quantizer.node, 0))
        with graph.inserting_before(quantizer.node):
            flat = flat_factors(graph, factors, norm.node)
            return insert_call(graph, chosen, (*arguments, *quantizer.operands, list(padding), *flat), anchor=norm.node)

    def _replace_floats(self, graph: fx.Graph, norm: Normalization, arguments: tuple[Any, ...]) -> None:
        """What reads the norm in float gets the float kernel's result, in the norm's own shape."""
        with graph.inserting_before(norm.last):
            new = insert_call(graph, OPERATORS.group_norm.default, arguments, anchor=norm.node)
            if node_value(norm.node).ndim == 3:
                new = insert_call(graph, aten.squeeze.dim, (new, 1), anchor=norm.node)
            order = FIRST if node_value(norm.node).ndim == 4 else [0, 2, 1]
            new = insert_call(graph, aten.permute.default, (new, order), anchor=norm.node)
        replace_node(norm.last, new, results=False)
