"""Quantize by constants, and scale each item of the batch by its own parameters outside the integer layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.passes.base import GraphPass, Numerics
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.item_columns import ItemColumns
from tfmq_fx.passes.support.item_quantizers import ItemQuantizer, constant_weight_of, item_quantizer, sums_of
from tfmq_fx.passes.support.nodes import add_buffer, argument_of, insert_call, insert_get_attr
from tfmq_fx.passes.support.predicates import fqn, is_call, is_matmul, node_value

__all__ = ["FactorItemScales"]

aten = torch.ops.aten
#: What repeats values and keeps them in their items: scaling goes in front, where there are fewer.
UPSAMPLES = (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
Column = tuple[Hashable, int]


class FactorItemScales(GraphPass):
    """Make the quantizers of items constant: scale by an item's parameters before them and behind the layer.

    Before::

        %s = index_select(%scales, 0, %rows)      %z = index_select(%zero_points, 0, %rows)      # [N]
        %q = quantize_per_channel(%x, %s, %z, 0, 0, 255, uint8)      %d = dequantize_per_channel(%q, %s, %z, …)
        %y = conv2d(%d, %w, %b, stride, padding)

    After::

        %r, %z, %s, %t = split(reshape(index_select(%item_columns, 0, %rows), …), …)   # 1/s, z, s, -z*s: [N, 1, 1, 1]
        %u = add(mul(%x, %r), %z)
        %q = quantize_per_tensor(%u, 1.0, 0, 0, 255, uint8)      %d = dequantize_per_tensor(%q, 1.0, 0, …)
        %c = conv2d(%d, %w, None, stride, padding)
        %y = add(mul(%c, %s), add(mul(%sums, %t), %b))           # sums = conv2d(ones, %w, None, stride, padding)

    Where all zero points of a table are equal (of symmetric activations, of a softmax) nothing is shifted, and the
    quantizer keeps it: ``quantize_per_tensor(mul(%x, %r), 1.0, z)``, ``add(mul(%c, %s), %b)``. Then products of two
    activations are scaled like layers. What else reads such an activation has the rounding written out in float.

    Legality: a layer is linear, and its ``conv(s * (q - z))`` is ``s * (conv(q) - z * conv(1))`` item by item. A border
    of zeros adds nothing to either sum, so no border is written: near it ``conv(1)`` is smaller, and ``sums`` has the
    size of the image. The weight is a constant, and so are the image's sizes. Numerics are preserved up to float
    rounding: ``x / s + z`` is rounded once in the place of ``x / s``; where ``x / s`` lies halfway between two integers
    and ``z`` is odd, the other one is taken. ``c * s`` and ``sums * t`` cancel. ``c`` is a sum of integers, rounded
    once, so that costs a rounding of 24 bits times ``|c s| / |y|``: 1 to 3 behind a SiLU and 4 for centred activations,
    where the result is as near the exact one as that of a float convolution or nearer; 200 (an error of 1e-5) where
    most weights of a channel have one sign and activations are centred.
    Why: an engine's integer layers take one constant quantizer, and its loops between layers take the rest.
    Meta: new nodes take the module stack of those that they replace; layers stay the nodes that they are.
    """

    id: ClassVar[str] = "tfmq::factor_item_scales"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def rewrite(self, graph_module: fx.GraphModule) -> bool:
        """Plan all quantizers, lay their numbers into common tables, and replace them."""
        found = (item_quantizer(node) for node in graph_module.graph.nodes)
        quantizers = [quantizer for quantizer in found if quantizer is not None]
        columns = ItemColumns()
        wanted = [_ask(columns, quantizer) for quantizer in quantizers]
        for quantizer, asked in zip(quantizers, wanted, strict=True):
            _Replacement(graph_module, columns, quantizer, asked).replace()
        graph_module.graph.eliminate_dead_code()
        return bool(quantizers)


def _ask(columns: ItemColumns, quantizer: ItemQuantizer) -> dict[str, Column]:
    """Ask for the numbers that the replacement of a quantizer reads."""
    scales, zeros = quantizer.scales.double(), quantizer.zero_points.double()
    numbers = {"inverse": 1 / scales, "scale": scales}
    if quantizer.constant is None or quantizer.others:
        numbers["zero_point"] = zeros
    if quantizer.constant is None and quantizer.factored:
        numbers["shift"] = -zeros * scales
    return {name: columns.add(quantizer.index, value.float(), quantizer.ndim) for name, value in numbers.items()}


class _Replacement:
    """Replaces one quantizer."""

    def __init__(
        self, graph_module: fx.GraphModule, columns: ItemColumns, quantizer: ItemQuantizer, asked: dict[str, Column]
    ) -> None:
        self.graph_module, self.graph = graph_module, graph_module.graph
        self.columns, self.quantizer, self.asked = columns, quantizer, asked

    def replace(self) -> None:
        """Hand each reader what it can take."""
        quantizer = self.quantizer
        with self.graph.inserting_before(quantizer.restored):
            source, repeats = argument_node(quantizer.quantize, 0), list[fx.Node]()
            while is_call(source, *UPSAMPLES):
                repeats.insert(0, source)
                source = argument_node(source, 0)
            ratio = self._call(aten.mul.Tensor, source, self._number("inverse"))
            if quantizer.factored:
                integers = self._integers(ratio, repeats)
            if quantizer.others:
                written = self._repeated(self._written_out(ratio), repeats)
        for layer in quantizer.factored:
            layer.replace_input_with(quantizer.restored, integers)
            self._scale(layer)
        for reader in quantizer.others:
            reader.replace_input_with(quantizer.restored, written)

    def _call(self, operator: Any, *args: Any, anchor: fx.Node | None = None) -> fx.Node:
        return insert_call(self.graph, operator, args, anchor=anchor or self.quantizer.quantize)

    def _number(self, name: str, anchor: fx.Node | None = None) -> fx.Node:
        return self.columns.read(self.graph_module, self.asked[name], anchor or self.quantizer.quantize)

    def _repeated(self, value: fx.Node, repeats: Sequence[fx.Node]) -> fx.Node:
        """What was taken off the source, put back."""
        for repeat in repeats:
            value = self._call(repeat.target, value, *repeat.args[1:], anchor=repeat)
        return value

    def _integers(self, ratio: fx.Node, repeats: Sequence[fx.Node]) -> fx.Node:
        """The pair with step 1."""
        zero = self.quantizer.constant
        if zero is None:
            ratio = self._call(aten.add.Tensor, ratio, self._number("zero_point"))
        tail = (1.0, zero or 0, *self.quantizer.quantize.args[4:])
        quantized = self._call(decomposed.quantize_per_tensor.default, self._repeated(ratio, repeats), *tail)
        return self._call(decomposed.dequantize_per_tensor.default, quantized, *tail, anchor=self.quantizer.restored)

    def _written_out(self, ratio: fx.Node) -> fx.Node:
        """The values themselves, in float."""
        zero = self._number("zero_point")
        shifted = self._call(aten.add.Tensor, self._call(aten.round.default, ratio), zero)
        clamped = self._call(aten.clamp.default, shifted, *self.quantizer.quantize.args[4:6])
        return self._call(aten.mul.Tensor, self._call(aten.sub.Tensor, clamped, zero), self._number("scale"))

    def _scale(self, layer: fx.Node) -> None:
        """Scale and shift the result of a layer, which gives its bias away."""
        readers = list(layer.users)
        bias: Any = None
        if not is_matmul(layer):
            bias = argument_of(layer, 2, "bias", None)
            layer.args = tuple(None if place == 2 else value for place, value in enumerate(layer.args))
        with self.graph.inserting_before(layer.next):
            addend = self._addend(layer, bias)
            result = self._call(aten.mul.Tensor, layer, self._number("scale", layer), anchor=layer)
            if addend is not None:
                result = self._call(aten.add.Tensor, result, addend, anchor=layer)
        for reader in readers:
            reader.replace_input_with(layer, result)

    def _addend(self, layer: fx.Node, bias: Any) -> fx.Node | None:
        """What the zero points take off, and the bias."""
        addend: fx.Node | None = None
        if bias is not None:
            along = [1] * (node_value(layer).ndim - 1)
            shape = [*along, -1] if is_call(layer, aten.linear.default) else [1, -1, *along[1:]]
            addend = self._call(aten.reshape.default, bias, shape, anchor=layer)
        if self.quantizer.constant is not None:
            return addend
        weight = constant_weight_of(layer)
        assert weight is not None
        name = add_buffer(self.graph_module, f"{fqn(layer)}_sums", sums_of(layer, weight))
        sums = insert_get_attr(self.graph_module, name, anchor=layer)
        taken = self._call(aten.mul.Tensor, sums, self._number("shift", layer), anchor=layer)
        return taken if addend is None else self._call(aten.add.Tensor, taken, addend, anchor=layer)
