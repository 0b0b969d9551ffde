"""The kernels as a program gets them: operators of drawn shapes and layouts in one graph, compiled by Inductor."""

import random

import pytest
import torch
from hypothesis import settings
from torch import nn

import tfmq_fx
from tests.kernels import naive
from tests.kernels.test_compiled_kernels import assert_within
from tfmq_fx.kernels import OPERATORS, pack_weight
from tfmq_fx.kernels.checks import has_native_kernels
from tfmq_fx.kernels.inductor import register_native_kernels
from tfmq_fx.lowering.backends.inductor.compiler import compile_inductor
from tfmq_fx.lowering.backends.inductor.native import on_native_kernels
from tfmq_fx.testing import GraphBuilder
from tfmq_fx.testing.quantized_layers import attention, conv, linear

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(not has_native_kernels(), reason="this processor has no AVX-512 VNNI")
#: One program of a dozen calls in `make test`, ten in `make nightly`: its kernels take seconds to compile.
PROGRAMS = range(max(1, settings.default.max_examples // 100))
EACH = 3
COUNTS = (1, 2, 5)


def exact(value):
    """The float32 that is nearest to ``value``, as scales are."""
    return float(torch.tensor(value))


class Conv:
    """One call of ``integer_conv``, over a slice, a permutation or an expansion of its own input."""

    def __init__(self, draw, module, name):
        self.kernel = [draw.choice((1, 3, 5, 7)) for _ in range(2)]
        self.stride = [draw.randint(1, 3) for _ in range(2)]
        self.depth, channels = 4 * draw.randint(1, 12), draw.choice((16, 48, 64, 96, 80))
        self.space = [k + draw.randint(0, 6) for k in self.kernel]
        self.dtype, self.layout = draw.choice((torch.float32, torch.bfloat16)), draw.choice(("first", "slice", "one"))
        self.residual = draw.random() < 0.5
        size = (channels, self.depth, *self.kernel)
        self.plain = torch.randint(-128, 128, size, dtype=torch.int8)
        self.scale, self.bias = torch.rand(channels) * 1e-4, torch.randn(channels)
        for key, value in (("weight", pack_weight(self.plain)), ("scale", self.scale), ("bias", self.bias)):
            module.register_buffer(f"{name}_{key}", value)
        self.name, self.module = name, [module]
        out = [(n - k) // s + 1 for n, k, s in zip(self.space, self.kernel, self.stride, strict=True)]
        self.out = (channels, *out)

    def inputs(self, count):
        height, width = self.space
        size = {"first": (self.depth, height, width), "slice": (height, width, self.depth + 20), "one": (height, width)}
        rows = 1 if self.layout == "one" else count
        tail = (self.depth,) if self.layout == "one" else ()
        x = torch.randint(0, 256, (rows, *size[self.layout], *tail), dtype=torch.uint8)
        return [x, torch.randn(count, *self.out)]

    def operands(self, x, residual):
        views = {"first": lambda: x.permute(0, 2, 3, 1), "slice": lambda: x[..., 7 : 7 + self.depth]}
        image = views.get(self.layout, lambda: x.expand(residual.shape[0], -1, -1, -1))()
        return image, residual.permute(0, 2, 3, 1).to(self.dtype) if self.residual else None

    def call(self, *inputs):
        image, residual = self.operands(*inputs)
        constants = [getattr(self.module[0], f"{self.name}_{key}") for key in ("weight", "scale", "bias")]
        return OPERATORS.integer_conv(image, *constants, residual, self.kernel, self.stride, self.dtype)

    def wanted(self, *inputs):
        image, residual = self.operands(*inputs)
        return naive.integer_conv(image, self.plain, self.scale, self.bias, residual, self.stride, self.dtype)


class Norm:
    """One call of a norm, of one or two images, the shift a part of the rows of a table."""

    def __init__(self, draw, module, name):
        self.counts = [16 * draw.randint(1, 6) for _ in range(draw.choice((1, 2)))]
        self.channels = sum(self.counts)
        self.groups = draw.choice([n for n in (1, 2, 4, 8, self.channels) if self.channels % n == 0])
        self.space, self.silu = (draw.randint(1, 9), draw.randint(1, 9)), draw.random() < 0.5
        self.quantizer = (exact(0.02), draw.randint(0, 255), [draw.randint(0, 2) for _ in range(4)])
        self.moved = draw.choice((None, "rows", "row"))
        self.gain, self.offset = torch.randn(self.channels), torch.randn(self.channels)
        for key, value in (("gain", self.gain), ("offset", self.offset)):
            module.register_buffer(f"{name}_{key}", value)
        self.name, self.module, self.quantizes = name, [module], draw.random() < 0.7
        self.factors = torch.rand(self.channels) + 0.5 if draw.random() < 0.5 else None
        module.register_buffer(f"{name}_factors", self.factors)

    def inputs(self, count):
        images = [torch.randn(count, n, *self.space) * 3 + 5 for n in self.counts]
        return [*images, torch.randn(1 if self.moved == "row" else count, 2 * self.channels)]

    def operands(self, *inputs):
        images = [x.permute(0, 2, 3, 1) for x in inputs[:-1]]
        return images, None if self.moved is None else inputs[-1][:, self.channels :]

    def call(self, *inputs):
        constants = [getattr(self.module[0], f"{self.name}_{key}") for key in ("gain", "offset")]
        arguments = (*self.operands(*inputs), *constants, self.groups, 1e-5, self.silu)
        if self.quantizes:
            factors = getattr(self.module[0], f"{self.name}_factors")
            return OPERATORS.quantized_group_norm(*arguments, *self.quantizer, factors)
        return OPERATORS.group_norm(*arguments)

    def wanted(self, *inputs):
        value, error = naive.group_norm(*self.operands(*inputs), self.gain, self.offset, self.groups, 1e-5, self.silu)
        if not self.quantizes:
            return value, error
        scale, zero, (top, left, bottom, right) = self.quantizer
        place, room = naive.quantized(*naive.times(value, error, self.factors), scale, zero)
        room = nn.functional.pad(room, [0, 0, left, right, top, bottom])
        return naive.padded(place, zero, self.quantizer[2]), room


class Image:
    """One call of ``quantized_image``."""

    def __init__(self, draw, module, name):
        self.size = (16 * draw.randint(1, 6), draw.randint(1, 7), draw.randint(1, 7))
        self.enlarge, self.zero, self.narrow = draw.randint(1, 3), draw.randint(0, 255), draw.random() < 0.5
        self.padding = [draw.randint(0, 2) for _ in range(4)]
        self.factors = torch.rand(self.size[0]) + 0.5 if draw.random() < 0.5 else None
        module.register_buffer(f"{name}_factors", self.factors)
        self.name, self.module = name, [module]

    def inputs(self, count):
        return [torch.randn(count, *self.size)]

    def image(self, x):
        return (x.bfloat16() if self.narrow else x).permute(0, 2, 3, 1)

    def call(self, x):
        factors = getattr(self.module[0], f"{self.name}_factors")
        return OPERATORS.quantized_image(self.image(x), self.enlarge, exact(0.02), self.zero, self.padding, factors)

    def wanted(self, x):
        value = naive.steps(naive.scaled(self.image(x), self.factors), exact(0.02), self.zero)
        value = value.repeat_interleave(self.enlarge, 1).repeat_interleave(self.enlarge, 2)
        value = naive.padded(value, self.zero, self.padding)
        return value, torch.zeros_like(value)


class Attention:
    """One call of ``integer_attention``, of heads side by side, grouped, of one image for all, or expanded."""

    def __init__(self, draw, module, name):
        self.heads, self.depth, self.rows, self.keys = draw.choice((2, 4, 6)), 4 * draw.randint(1, 16), 9, 21
        self.layout = draw.choice(("own", "grouped", "image", "expanded"))
        self.dtype = draw.choice((torch.float32, torch.bfloat16))
        self.parameters = (0.25, [exact(s) for s in (0.01, 0.03, 1 / 255, 0.03)], [draw.randint(0, 255), 120, 131])
        self.deferred = draw.choice((False, True))

    def inputs(self, count):
        shared = 2 if self.layout == "grouped" else 1 if self.layout == "expanded" else self.heads
        rows = 1 if self.layout == "image" else count
        query = torch.randn(count, self.rows, self.heads * self.depth)
        return [query, torch.randn(rows, self.keys, 2 * shared * self.depth)]

    def operands(self, query, joined):
        joined = joined.to(self.dtype)
        key, value = joined.chunk(2, -1)
        heads = [x.unflatten(2, (-1, self.depth)).transpose(1, 2) for x in (query.to(self.dtype), key, value)]
        if self.layout == "expanded":
            heads[1:] = [x.expand(-1, self.heads, -1, -1) for x in heads[1:]]
        return heads

    def call(self, *inputs):
        return OPERATORS.integer_attention(*self.operands(*inputs), *self.parameters, self.deferred)

    def wanted(self, *inputs):
        return naive.integer_attention(*self.operands(*inputs), *self.parameters, self.dtype, self.deferred)


class Calls(nn.Module):
    """Drawn calls of all operators; every result is returned."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        kinds = [kind for kind in (Conv, Norm, Image, Attention) for _ in range(EACH)]
        self.calls = [kind(draw, self, f"call{i}") for i, kind in enumerate(kinds)]

    def inputs(self, count):
        return [call.inputs(count) for call in self.calls]

    def forward(self, inputs):
        return [call.call(*own) for call, own in zip(self.calls, inputs, strict=True)]


@pytest.mark.parametrize("seed", PROGRAMS)
def test_drawn_calls(seed):
    register_native_kernels()
    module = Calls(seed).eval()
    program = tfmq_fx.capture(module, (module.inputs(2),))
    run, _ = compile_inductor(program)
    for count in COUNTS:
        inputs = module.inputs(count)
        with torch.no_grad():
            given = run(inputs)
        for call, own, result in zip(module.calls, inputs, given, strict=True):
            assert result.is_contiguous()
            assert_within(result, *call.wanted(*own))


def test_what_the_kernels_do_not_cover_is_right_elsewhere():
    """Odd channels, odd depths and masks go to oneDNN or stay float; what stands beside them is on the kernels."""
    builder = GraphBuilder()
    x = builder.placeholder("x", (3, 16, 7, 5))
    odd = conv(builder, x, "odd", 20)
    outputs = [odd, conv(builder, odd, "back", 32, kernel=1), conv(builder, x, "grouped", 16, groups=4)]
    outputs.append(conv(builder, x, "even", 48, kernel=5, stride=2))
    rows = builder.placeholder("rows", (6, 33))
    outputs.append(linear(builder, rows, "of_33", 17))
    outputs.append(linear(builder, outputs[-1], "of_17", 64))
    outputs.append(linear(builder, outputs[-1], "of_64", 64))
    query = builder.placeholder("query", (2, 4, 9, 8))
    key, value = (builder.placeholder(name, (2, 1, 11, 8)) for name in ("key", "value"))
    outputs += [
        attention(builder, query, key, value),
        attention(builder, query, value, key, mask=builder.placeholder("m", (9, 11))),
    ]
    graph_module = builder.build(outputs)
    inputs = tuple(torch.randn(node.meta["val"].shape) for node in graph_module.graph.nodes if node.op == "placeholder")
    lowered = on_native_kernels(graph_module, "f32")
    targets = [node.target for node in lowered.graph.nodes]
    assert targets.count(OPERATORS.integer_conv.default) == 2 and targets.count(aten.conv2d.default) == 3
    assert targets.count(aten.linear.default) == 2 and targets.count(OPERATORS.integer_attention.default) == 1
    with torch.no_grad():
        given, wanted = compile_inductor(lowered)[0](*inputs), graph_module(*inputs)
    for one, other in zip(given, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02
