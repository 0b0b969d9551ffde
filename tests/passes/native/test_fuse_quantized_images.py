import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import FuseQuantizedImages, LowerIntegerConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import conv, quantized

aten = torch.ops.aten
IMAGE = OPERATORS.quantized_image.default


def sampler(kind, *, dynamic=False, factors=False):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 16, 4, 6))
    geometry = {"plain": {}, "point": {"kernel": 1}, "up": {}, "down": {"stride": 2, "padding": 0}}[kind]
    if kind == "up":
        x = builder.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    if kind == "down":
        x = builder.call(aten.pad.default, x, [0, 1, 0, 1], "constant", 0.0)
    if factors:
        x = builder.call(aten.mul.Tensor, x, builder.buffer("factors", torch.linspace(0.1, 3, 16)[:, None, None]))
    graph_module = builder.build(conv(builder, x, "sampler.conv", 16, **geometry))
    assert LowerIntegerConvs()(graph_module).modified
    return graph_module


@pytest.mark.parametrize(
    ("kind", "enlarge", "padding"),
    [("plain", 1, [1, 1, 1, 1]), ("point", 1, [0] * 4), ("up", 2, [1, 1, 1, 1]), ("down", 1, [0, 0, 1, 1])],
)
@pytest.mark.parametrize("factors", [False, True])
def test_fires(kind, enlarge, padding, factors):
    graph_module = sampler(kind, factors=factors)
    assert FuseQuantizedImages()(graph_module).modified
    (node,) = calls(graph_module, IMAGE)
    assert node.args[1] == enlarge and node.args[4] == padding and len(node.args) == 5 + factors
    left = {aten.permute.default, IMAGE, OPERATORS.integer_conv.default}
    assert set(operators(graph_module)) == (left | {aten.reshape.default} if factors else left)


def test_does_not_fire_where_something_else_reads_the_bytes_or_vectors_do_not_fit():
    builder = GraphBuilder()
    once = quantized(builder, builder.placeholder("x", (2, 16, 4, 6)))
    few = quantized(builder, builder.placeholder("y", (2, 8, 4, 6)))
    turned = [builder.call(aten.permute.default, node, [0, 2, 3, 1]) for node in (once, few)]
    assert unchanged(FuseQuantizedImages(), builder.build([*turned, once]))


@pytest.mark.parametrize("order", ["scaled, padded", "padded, scaled", "padded, scaled, padded"])
def test_factors_go_along_on_either_side_of_borders(order):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 4, 6))
    for step in order.split(", "):
        if step == "scaled":
            x = builder.call(aten.mul.Tensor, x, builder.buffer("factors", torch.linspace(0.1, 3, 16)[:, None, None]))
        else:
            x = builder.call(aten.constant_pad_nd.default, x, [1, 0, 2, 0], 0.0)
    graph_module = builder.build(conv(builder, x, "conv", 16, padding=0))
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseQuantizedImages, graph_module, (torch.randn(2, 16, 4, 6),), exact=True)
    (node,) = calls(result.graph_module, IMAGE)
    count = order.count("padded")
    assert node.args[4] == [2 * count, count, 0, 0] and len(node.args) == 6
    assert not calls(result.graph_module, aten.mul.Tensor)


def test_of_two_factors_one_goes_along():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 4, 6))
    for name in ("first", "second"):
        x = builder.call(aten.mul.Tensor, x, builder.buffer(name, torch.linspace(0.1, 3, 16)[:, None, None]))
    graph_module = builder.build(conv(builder, x, "conv", 16))
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseQuantizedImages, graph_module, (torch.randn(2, 16, 4, 6),), exact=True)
    (left,) = calls(result.graph_module, aten.mul.Tensor)
    assert left.args[1].target == "first"


@pytest.mark.parametrize(
    "other", [torch.ones(1, 1), torch.ones(16, 1, 6), torch.ones(16, 1, 1, dtype=torch.float64), None]
)
def test_factors_that_are_none_of_channels_stay_outside(other):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 4, 6))
    by = builder.placeholder("by", (16, 1, 1)) if other is None else builder.buffer("by", other)
    scaled = builder.call(aten.to.dtype, builder.call(aten.mul.Tensor, x, by), torch.float32)
    graph_module = builder.build(conv(builder, scaled, "conv", 16))
    LowerIntegerConvs()(graph_module)
    FuseQuantizedImages()(graph_module)
    (node,) = calls(graph_module, IMAGE)
    assert len(node.args) == 5 and len(calls(graph_module, aten.mul.Tensor)) == 1


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["plain", "point", "up", "down"])
def test_numerics(kind, dynamic, factors):
    more = [(torch.randn(5, 16, 4, 6),)] if dynamic else []
    graph_module = sampler(kind, dynamic=dynamic, factors=factors)
    assert_pass_contract(FuseQuantizedImages, graph_module, (torch.randn(2, 16, 4, 6),), exact=True, more_inputs=more)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [(aten.pad.default, ([0, 1, 0, 1], "constant", 1.0)), (aten.upsample_nearest2d.vec, (None, [1.5, 1.5]))],
)
def test_a_border_of_ones_and_half_pixels_stay_outside(operator, arguments):
    builder = GraphBuilder()
    x = builder.call(operator, builder.placeholder("x", (2, 16, 4, 6)), *arguments)
    graph_module = builder.build(conv(builder, x, "conv", 16))
    LowerIntegerConvs()(graph_module)
    example = (torch.randn(2, 16, 4, 6),)
    result = assert_pass_contract(FuseQuantizedImages, graph_module, example, exact=True)
    assert calls(result.graph_module, operator)


def test_several_users_of_image_and_bytes():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 16, 4, 6))
    up = builder.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    once = quantized(builder, up)
    outputs = [conv(builder, once, "wide", 16), conv(builder, once, "narrow", 16, kernel=1), up]
    graph_module = builder.build(outputs)
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseQuantizedImages, graph_module, (torch.randn(2, 16, 4, 6),), exact=True)
    assert sorted(node.args[4] for node in calls(result.graph_module, IMAGE)) == [[0] * 4, [1] * 4]
