"""The passes that put a graph on our integer kernels, on generated stacks of quantized layers."""

import copy

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from tfmq_fx.passes import (
    NATIVE_KERNELS,
    FuseGroupNorms,
    LowerIntegerAttention,
    LowerIntegerConvs,
    NarrowActivations,
)

from tests.passes.native.test_lower_integer_attention import attention
from tests.passes.quantized_layers import SILU, conv, group_norm, linear, quantized
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten
CHANNELS = (16, 32, 48, 24)  # the last is none that the kernels take
SIZE = 4
#: Another order of float operations may turn a rounding, which is one step of one activation, and then of what reads it
TOLERANCES = {LowerIntegerConvs: 0.15, FuseGroupNorms: 0.15, LowerIntegerAttention: 0.15, NarrowActivations: 0.3}


class Stack:
    """Grows a network on one image ``[N, C, 4, 4]``, layer by layer, from drawn choices."""

    def __init__(self, draw, dynamic):
        self.draw, self.count = draw, 0
        self.builder = GraphBuilder(dynamic_batch=dynamic)
        self.image = self.builder.placeholder("x", (self.builder.batch, 16, SIZE, SIZE))
        self.shapes = [(16, SIZE, SIZE)]
        self.rows = self.builder.call(aten.sym_size.int, self.image, 0) if dynamic else 2

    def grow(self, kind):
        self.count += 1
        self.image = getattr(self, kind)(f"{kind}{self.count}")

    def channels(self):
        return int(self.image.meta["val"].shape[1])

    def conv(self, name):
        kernel = self.draw(st.sampled_from((1, 3)))
        return conv(self.builder, self.image, name, self.draw(st.sampled_from(CHANNELS)), kernel=kernel)

    def residual(self, name):
        total = (self.image, conv(self.builder, self.image, name, self.channels()))
        return self.builder.call(aten.add.Tensor, *(total if self.draw(st.booleans()) else total[::-1]))

    def norm(self, name):
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

    def shift(self, name):
        """A value for each channel of each image, out of a linear, as a time embedding that is not in a table."""
        means = quantized(self.builder, self.builder.call(aten.mean.dim, self.image, [2, 3]))
        rows = linear(self.builder, means, name, self.channels())
        wide = self.builder.call(aten.unsqueeze.default, self.builder.call(aten.unsqueeze.default, rows, -1), -1)
        return self.builder.call(
            aten.add.Tensor, *((self.image, wide) if self.draw(st.booleans()) else (wide, self.image))
        )

    def concatenate(self, name):
        other = conv(self.builder, self.image, f"{name}.other", 16)
        joined = self.builder.call(aten.cat.default, [self.image, other], 1)
        normalized = quantized(self.builder, group_norm(self.builder, joined, name, groups=4))
        return conv(self.builder, normalized, f"{name}.conv", self.draw(st.sampled_from(CHANNELS)))

    def resize(self, name):
        up = self.builder.call(aten.upsample_nearest2d.vec, self.image, None, [2.0, 2.0])
        return conv(self.builder, up, name, 16, stride=2)

    def attend(self, name):
        """Self-attention with one head, as diffusers has it on images, and its residual."""
        call, channels = self.builder.call, self.channels()
        sequence = call(aten.view.default, self.image, [self.rows, channels, SIZE * SIZE])
        normalized = call(aten.transpose.int, group_norm(self.builder, sequence, name, groups=4), 1, 2)
        source = quantized(self.builder, call(aten.reshape.default, normalized, [-1, channels]))
        heads = []
        for part in ("q", "k", "v"):
            rows = linear(self.builder, source, f"{name}.{part}", 16)
            heads.append(call(aten.view.default, rows, [self.rows, 1, SIZE * SIZE, 16]))
        mixed = call(aten.transpose.int, attention(self.builder, *heads), 1, 2)
        back = linear(self.builder, call(aten.reshape.default, mixed, [-1, 16]), f"{name}.out", channels)
        turned = call(aten.transpose.int, call(aten.view.default, back, [self.rows, SIZE * SIZE, channels]), 1, 2)
        image = call(aten.reshape.default, turned, [self.rows, channels, SIZE, SIZE])
        return call(aten.add.Tensor, image, self.image)


KINDS = ("conv", "residual", "norm", "shift", "concatenate", "resize", "attend")


@given(st.data(), st.booleans(), st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
def test_every_pass_keeps_the_contract_in_order(data, dynamic, kinds):
    stack = Stack(data.draw, dynamic)
    for kind in kinds:
        stack.grow(kind)
    graph_module = stack.builder.build([stack.image])

    def inputs(batch):
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn((batch, *shape), generator=generator) for shape in stack.shapes)

    more = [inputs(batch) for batch in (1, 3)] if dynamic else []
    for make in (*NATIVE_KERNELS, NarrowActivations):
        tolerance = TOLERANCES.get(make, 1e-3)
        result = assert_pass_contract(make, graph_module, inputs(2), rtol=tolerance, atol=tolerance, more_inputs=more)
        event(f"{make.__name__} {'fired' if result.modified else 'did not fire'}")
        graph_module = copy.deepcopy(result.graph_module)
    operators = [node.target for node in graph_module.graph.nodes]
    taken = sum(target in (OPERATORS.integer_conv.default, OPERATORS.integer_attention.default) for target in operators)
    left = [node for node in graph_module.graph.nodes if node.target is aten.conv2d.default]
    assert taken or kinds == ["shift"] * len(kinds) or 24 in {node.meta["val"].shape[1] for node in left}
