"""Random stacks of quantized layers, as our integer kernels take them and as they do not."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import fx

from .favoured_kinds import check_favoured
from .generated_graph import GeneratedGraph
from .graph_builder import GraphBuilder
from .quantized_layers import SILU, attention, conv, group_norm, linear, quantized, weight

__all__ = ["QUANTIZED_LAYERS", "quantized_graphs"]

aten = torch.ops.aten
CHANNELS = (16, 32, 48, 24)  # the last is none that the kernels take
SIZE = 4
#: A step of 16 bits that fits numbers of a standard normal distribution.
WORD_SCALE = 2e-4
#: The kinds of layers.
QUANTIZED_LAYERS = (
    "conv",
    "residual",
    "shortcut",
    "norm",
    "shift",
    "concatenate",
    "resize",
    "attend",
    "asymmetric",
    "without_values",
)


@st.composite
def quantized_graphs(
    draw: st.DrawFn,
    *,
    max_layers: int = 4,
    dynamic_batch: bool | None = None,
    favour: tuple[str, ...] = (),
) -> GeneratedGraph:
    """Random networks of quantized layers on one image, as ``convert`` leaves them.

    Args:
        draw: Given by Hypothesis.
        max_layers: How many layers to draw at most.
        dynamic_batch: Whether the batch is symbolic; either by default.
        favour: Kinds of layers, out of :data:`QUANTIZED_LAYERS`, of which the first is always drawn. Weights with zero
            points and nodes without recorded values, as ``convert_pt2e`` makes them, are drawn only then.

    Raises:
        ConfigError: ``favour`` has something else.
    """
    check_favoured(favour, QUANTIZED_LAYERS)
    dynamic = draw(st.booleans()) if dynamic_batch is None else dynamic_batch
    usual = st.sampled_from([kind for kind in QUANTIZED_LAYERS if kind not in ("asymmetric", "without_values")])
    kinds = [*favour[:1], *draw(st.lists(usual, min_size=not favour, max_size=max_layers - len(favour[:1])))]
    stack = _Stack(draw, dynamic)
    for kind in kinds:
        stack.grow(kind)
    graph_module = stack.builder.build([stack.image])
    if stack.unrecorded:
        for node in graph_module.graph.nodes:
            if getattr(node.target, "namespace", "") == "quantized_decomposed":
                del node.meta["val"]

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn((batch, *shape), generator=generator) for shape in stack.shapes)

    more = tuple(inputs(batch) for batch in (1, 3)) if dynamic else ()
    return GeneratedGraph(graph_module, inputs(2), more)


class _Stack:
    """Grows a network on one image ``[N, C, 4, 4]``, layer by layer, from drawn choices."""

    def __init__(self, draw: st.DrawFn, dynamic: bool) -> None:
        self.draw, self.count = draw, 0
        self.builder = GraphBuilder(dynamic_batch=dynamic)
        self.image = self.builder.placeholder("x", (self.builder.batch, 16, SIZE, SIZE))
        self.shapes: list[tuple[int, ...]] = [(16, SIZE, SIZE)]
        self.batch_size = self.builder.call(aten.sym_size.int, self.image, 0) if dynamic else 2
        self.unrecorded = False

    def grow(self, kind: str) -> None:
        self.count += 1
        self.image = getattr(self, kind)(f"{kind}{self.count}")

    def channels(self) -> int:
        return int(self.image.meta["val"].shape[1])

    def conv(self, name: str) -> fx.Node:
        kernel = self.draw(st.sampled_from((1, 3)))
        return conv(self.builder, self.image, name, self.draw(st.sampled_from(CHANNELS)), kernel=kernel)

    def residual(self, name: str) -> fx.Node:
        total = (self.image, conv(self.builder, self.image, name, self.channels()))
        return self.builder.call(aten.add.Tensor, *(total if self.draw(st.booleans()) else total[::-1]))

    def shortcut(self, name: str) -> fx.Node:
        """A residual block whose projection reads 16 bits."""
        channels = self.draw(st.sampled_from(CHANNELS))
        words = quantized(self.builder, self.image, WORD_SCALE, 32768, 0, 65535, torch.int32)
        projected = conv(self.builder, words, f"{name}.projection", channels, kernel=1)
        return self.builder.call(aten.add.Tensor, projected, conv(self.builder, self.image, name, channels))

    def norm(self, name: str) -> fx.Node:
        source = self.image
        if self.draw(st.booleans()):
            size = (self.channels(), 1, 1)
            self.shapes.append(size)
            shift = self.builder.placeholder(f"shift{self.count}", (self.builder.batch, *size))
            source = self.builder.call(aten.add.Tensor, source, shift)
        result = group_norm(self.builder, source, name, groups=4)
        silu = self.draw(st.booleans())
        result = self.builder.call(aten.silu.default, result) if silu else result
        return conv(self.builder, quantized(self.builder, result, *(SILU if silu else ())), f"{name}.conv", 16)

    def shift(self, name: str) -> fx.Node:
        """A value for each channel of each image, out of a linear, as a time embedding that is not in a table."""
        means = quantized(self.builder, self.builder.call(aten.mean.dim, self.image, [2, 3]))
        projected = linear(self.builder, means, name, self.channels())
        shift_image = self.builder.call(
            aten.unsqueeze.default, self.builder.call(aten.unsqueeze.default, projected, -1), -1
        )
        return self.builder.call(
            aten.add.Tensor, *((self.image, shift_image) if self.draw(st.booleans()) else (shift_image, self.image))
        )

    def concatenate(self, name: str) -> fx.Node:
        other = conv(self.builder, self.image, f"{name}.other", 16)
        joined = self.builder.call(aten.cat.default, [self.image, other], 1)
        normalized = quantized(self.builder, group_norm(self.builder, joined, name, groups=4))
        return conv(self.builder, normalized, f"{name}.conv", self.draw(st.sampled_from(CHANNELS)))

    def resize(self, name: str) -> fx.Node:
        enlarged = self.builder.call(aten.upsample_nearest2d.vec, self.image, None, [2.0, 2.0])
        return conv(self.builder, enlarged, name, 16, stride=2)

    def attend(self, name: str) -> fx.Node:
        """Self-attention with one head, as diffusers has it on images, and its residual."""
        call, channels = self.builder.call, self.channels()
        sequence = call(aten.view.default, self.image, [self.batch_size, channels, SIZE * SIZE])
        normalized = call(aten.transpose.int, group_norm(self.builder, sequence, name, groups=4), 1, 2)
        source = quantized(self.builder, call(aten.reshape.default, normalized, [-1, channels]))
        heads = []
        for part in ("q", "k", "v"):
            projected = linear(self.builder, source, f"{name}.{part}", 16)
            heads.append(call(aten.view.default, projected, [self.batch_size, 1, SIZE * SIZE, 16]))
        mixed = attention(self.builder, *heads, deferred=self.draw(st.booleans()))
        mixed = call(aten.transpose.int, mixed, 1, 2)
        back = linear(self.builder, call(aten.reshape.default, mixed, [-1, 16]), f"{name}.out", channels)
        transposed = call(
            aten.transpose.int, call(aten.view.default, back, [self.batch_size, SIZE * SIZE, channels]), 1, 2
        )
        image = call(aten.reshape.default, transposed, [self.batch_size, channels, SIZE, SIZE])
        return call(aten.add.Tensor, image, self.image)

    def asymmetric(self, name: str) -> fx.Node:
        """A convolution of one pixel whose 4-bit weight has a zero point, as asymmetric quantization makes it."""
        channels = self.channels()
        matrix = weight(self.builder, name, (16, channels, 1, 1), zero=7, bounds=(0, 15), dtype=torch.uint8)
        with self.builder.inside(name):
            return self.builder.call(aten.conv2d.default, self.image, matrix)

    def without_values(self, name: str) -> fx.Node:
        """A convolution; quantize and dequantize nodes of the whole graph have no recorded values."""
        self.unrecorded = True
        return conv(self.builder, self.image, name, 16)
