import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import LowerIntegerConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import QUANTIZE, conv, linear, quantized, weight

aten = torch.ops.aten


def one_conv(*, dynamic=False, depth=16, channels=32, **geometry):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, depth, 6, 7))
    return builder.build(conv(builder, x, "block.conv", channels, **geometry))


def one_linear(*, dynamic=False, bias=True):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 32))
    return builder.build(linear(builder, x, "attention.to_q", 48, bias=bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_fires(dynamic):
    graph_module = one_conv(dynamic=dynamic)
    assert LowerIntegerConvs()(graph_module).modified
    (node,) = calls(graph_module, OPERATORS.integer_conv.default)
    assert node.args[0].target is aten.constant_pad_nd.default and node.args[0].args[2] == 120
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "block.conv"]
    assert set(operators(graph_module)) == {
        QUANTIZE, aten.permute.default, aten.constant_pad_nd.default, OPERATORS.integer_conv.default
    }  # fmt: skip


def test_a_linear_is_a_convolution_of_single_pixels():
    graph_module = one_linear()
    assert LowerIntegerConvs()(graph_module).modified
    (node,) = calls(graph_module, OPERATORS.integer_conv.default)
    assert tuple(node.meta["val"].shape) == (2, 1, 1, 48)


@pytest.mark.parametrize("geometry", [{"depth": 8}, {"channels": 24}, {"groups": 2}, {"kernel": 9, "padding": 4}])
def test_does_not_fire_on_what_the_kernel_does_not_cover(geometry):
    assert unchanged(LowerIntegerConvs(), one_conv(**geometry))


@pytest.mark.parametrize(("parameters", "zero"), [((0.03, 0, -128, 127, torch.int8), 0), ((0.03, 120), 1)])
def test_does_not_fire_on_signed_activations_or_weights_with_zero_points(parameters, zero):
    builder = GraphBuilder()
    x = quantized(builder, builder.placeholder("x", (2, 16, 6, 6)), *parameters)
    back = builder.call(torch.ops.quantized_decomposed.dequantize_per_tensor.default, x, *x.args[1:])
    matrix = weight(builder, "conv", (16, 16, 3, 3), zero=zero)
    assert unchanged(LowerIntegerConvs(), builder.build(builder.call(aten.conv2d.default, back, matrix)))


@pytest.mark.parametrize(("depth", "fires"), [(1024, True), (1040, False)])
def test_does_not_fire_where_a_sum_could_pass_an_int32(depth, fires):
    """65,793 products of a byte and a signed byte at most: 64 taps of 1,024 channels are 65,536."""
    builder = GraphBuilder()
    x = builder.placeholder("x", (1, depth, 8, 8))
    graph_module = builder.build(conv(builder, x, "wide", 16, kernel=8, padding=0))
    assert unchanged(LowerIntegerConvs(), graph_module) is not fires


@pytest.mark.parametrize("name", ["conv_weight_scale", "conv_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_does_not_fire_on_constants_that_are_no_numbers(name, value):
    graph_module = one_conv()
    constant = {key.replace(".", "_"): tensor for key, tensor in graph_module.state_dict().items()}[f"block_{name}"]
    constant[3] = value
    assert unchanged(LowerIntegerConvs(), graph_module)


def test_does_not_fire_where_no_byte_is_zero():
    builder = GraphBuilder()
    x = quantized(builder, builder.placeholder("x", (2, 16, 6, 6)), 0.03, -4)
    assert unchanged(LowerIntegerConvs(), builder.build(conv(builder, x, "conv", 16)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [{}, {"bias": False}, {"kernel": 1}, {"stride": 2, "padding": 0}, {"kernel": 5, "channels": 80}, {"depth": 48}],
)
def test_numerics(dynamic, geometry):
    more = [(torch.randn(n, geometry.get("depth", 16), 6, 7),) for n in (1, 5)] if dynamic else []
    graph_module = one_conv(dynamic=dynamic, **geometry)
    example = (torch.randn(2, geometry.get("depth", 16), 6, 7),)
    assert_pass_contract(LowerIntegerConvs, graph_module, example, rtol=1e-4, atol=1e-4, more_inputs=more)


@pytest.mark.parametrize("bias", [False, True])
def test_numerics_of_linears(bias):
    more = [(torch.randn(1, 32),), (torch.randn(7, 32),)]
    graph_module = one_linear(dynamic=True, bias=bias)
    assert_pass_contract(LowerIntegerConvs, graph_module, (torch.randn(2, 32),), atol=1e-4, more_inputs=more)


def test_several_layers_of_one_activation_and_several_users_of_the_result():
    builder = GraphBuilder()
    x = quantized(builder, builder.placeholder("x", (2, 16, 6, 6)))
    first, second = conv(builder, x, "first", 16), conv(builder, x, "second", 32, kernel=1)
    graph_module = builder.build([first, builder.call(aten.neg.default, first), second, x])
    result = assert_pass_contract(LowerIntegerConvs, graph_module, (torch.randn(2, 16, 6, 6),), atol=1e-4)
    assert len(calls(result.graph_module, OPERATORS.integer_conv.default)) == 2
