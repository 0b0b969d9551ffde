"""Pointwise convolutions of 16-bit activations, on the kernel that quantizes them."""

import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import FuseResidualAdds, LowerPointwiseConvs, NarrowActivations
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import conv, quantized, quantized_by_rows

aten = torch.ops.aten
KERNEL = OPERATORS.integer_pointwise_conv
WORDS = {"bounds": (0, 65535), "dtype": torch.int32}
TABLE = {"scales": (1e-4, 2e-4, 5e-5), "zero_points": (32768, 30000, 40000), **WORDS}
ROWS = torch.tensor([2, 0])


def one_conv(*, by_row=False, dynamic=False, scaled=False, channels=32, depth=16, **geometry):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, depth, 6, 7))
    rows = builder.placeholder("rows", (builder.batch,), torch.int64) if by_row else None
    if scaled:
        factors = builder.buffer("factors", torch.linspace(0.5, 1.5, depth).reshape(-1, 1, 1))
        x = builder.call(aten.mul.Tensor, x, factors)
    node = quantized_by_rows(builder, x, rows, **TABLE) if by_row else words(builder, x)
    return builder.build(conv(builder, node, "block.conv", channels, **{"kernel": 1, **geometry}))


def words(builder, x, scale=1e-4, zero_point=32768, high=65535):
    return quantized(builder, x, scale, zero_point, 0, high, torch.int32)


def images(count=2, depth=16):
    return torch.randn(count, depth, 6, 7, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_fires(by_row, scaled):
    graph_module = one_conv(by_row=by_row, dynamic=True, scaled=scaled)
    assert LowerPointwiseConvs()(graph_module).modified
    (node,) = calls(graph_module, KERNEL.rows if by_row else KERNEL.default)
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "block.conv"]
    kernel = KERNEL.rows if by_row else KERNEL.default
    wanted = {aten.permute.default: 2, kernel: 1, **({aten.reshape.default: 1} if scaled else {})}
    assert operators(graph_module) == wanted, "the kernel quantizes and scales by itself"


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"scaled": True}, {"bias": False}, {"dynamic": True}, {"channels": 48}], ids=str
)
def test_keeps_its_contract(options, by_row):
    inputs = (images(), ROWS)[: 1 + by_row]
    more = [(images(3), torch.tensor([0, 2, 1]))[: 1 + by_row]] if options.get("dynamic") else []
    assert_pass_contract(LowerPointwiseConvs, one_conv(by_row=by_row, **options), inputs, more_inputs=more)


@pytest.mark.parametrize(
    "graph_module",
    [
        one_conv(kernel=3),
        one_conv(stride=2),
        one_conv(padding=1),
        one_conv(channels=24),
        one_conv(depth=24),
        one_conv(groups=2),
    ],
    ids=["a kernel of 9 pixels", "a stride", "a border", "24 channels out", "24 channels in", "groups"],
)
def test_does_not_fire(graph_module):
    assert unchanged(LowerPointwiseConvs(), graph_module)


@pytest.mark.parametrize("levels", [255, 4095])
def test_other_widths_are_not_its_own(levels):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 6, 7))
    graph_module = builder.build(conv(builder, words(builder, x, high=levels), "conv", 32, kernel=1))
    assert unchanged(LowerPointwiseConvs(), graph_module)


def test_several_readers_of_one_quantizer_quantize_for_themselves():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 6, 7))
    node = words(builder, x)
    first, second = (conv(builder, node, name, 32, kernel=1) for name in ("one", "two"))
    wide = conv(builder, node, "wide", 16, kernel=3)
    graph_module = builder.build((first, second, wide))
    assert_pass_contract(LowerPointwiseConvs, graph_module, (images(),))
    LowerPointwiseConvs()(graph_module)
    assert len(calls(graph_module, KERNEL.default)) == 2 and len(calls(graph_module, aten.conv2d.default)) == 1


def test_it_adds_the_residual_and_reads_bfloat16():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 16, 6, 7))
    first = conv(builder, words(builder, x), "one", 32, kernel=1)
    both = builder.call(aten.add.Tensor, first, conv(builder, words(builder, x), "two", 32, kernel=1))
    graph_module = builder.build(conv(builder, words(builder, both), "three", 32, kernel=1))
    wanted = graph_module(images())
    LowerPointwiseConvs()(graph_module)
    assert FuseResidualAdds()(graph_module).modified
    assert aten.add.Tensor not in operators(graph_module)
    torch.testing.assert_close(graph_module(images()), wanted, rtol=1e-4, atol=1e-5)
    assert NarrowActivations()(graph_module).modified
    *_, last = calls(graph_module, KERNEL.default)
    assert last.args[0].meta["val"].dtype == last.meta["val"].dtype == torch.bfloat16
    torch.testing.assert_close(graph_module(images()), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("geometry, fires", [((1, 0, 1, 1), True), (([1], [0], [1], 1), True), ((2, 0, 1, 1), False)])
def test_settings_may_be_numbers(geometry, fires):
    graph_module = one_conv()
    (node,) = calls(graph_module, aten.conv2d.default)
    node.args = (*node.args[:3], *geometry)
    assert LowerPointwiseConvs()(graph_module).modified is fires
