import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import FuseGroupNorms, LowerIntegerConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import SILU, conv, group_norm, linear, quantized

aten = torch.ops.aten
QUANTIZED = OPERATORS.quantized_group_norm.default
#: A rounding that turned is one step of one activation.
LOOSE = {"rtol": 1e-3, "atol": 2e-2}


def block(*, dynamic=False, parts=(32,), shift=None, silu=True, channels=16, factors=False):
    """[concatenation] [+ shift] -> GroupNorm -> SiLU -> quantized convolution, on the integer kernel."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    inputs = [builder.placeholder(f"x{i}", (builder.batch, size, 6, 5)) for i, size in enumerate(parts)]
    x = inputs[0] if len(inputs) == 1 else builder.call(aten.cat.default, inputs, 1)
    if shift is not None:
        x = builder.call(aten.add.Tensor, x, builder.placeholder("shift", (shift or builder.batch, sum(parts), 1, 1)))
    x = group_norm(builder, x, "block.norm")
    x = builder.call(aten.silu.default, x) if silu else x
    if factors:
        by = torch.linspace(0.2, 2, sum(parts))[:, None, None]
        x = builder.call(aten.mul.Tensor, x, builder.buffer("block.conv.factors", by))
    graph_module = builder.build(conv(builder, quantized(builder, x, *(SILU if silu else ())), "block.conv", channels))
    assert LowerIntegerConvs()(graph_module).modified
    return graph_module


def values(*shapes):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) + 0.5 for shape in shapes)


def test_fires():
    graph_module = block(parts=(16, 32), shift=0)
    assert FuseGroupNorms()(graph_module).modified
    (node,) = calls(graph_module, QUANTIZED)
    assert len(node.args[0]) == 2 and node.args[1] is not None and node.args[6] is True
    assert node.args[7:] == (*SILU, [1, 1, 1, 1])
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "block.norm"]
    left = {aten.permute.default, aten.reshape.default, QUANTIZED, OPERATORS.integer_conv.default}
    assert set(operators(graph_module)) == left


def test_factors_of_channels_go_along():
    graph_module = block(parts=(16, 32), factors=True)
    assert FuseGroupNorms()(graph_module).modified
    (node,) = calls(graph_module, QUANTIZED)
    assert node.args[7:10] == (*SILU, [1, 1, 1, 1]) and node.args[10].args[0].target == "block.conv.factors"
    assert not calls(graph_module, aten.mul.Tensor)


def test_factors_before_a_border_go_along():
    builder = GraphBuilder()
    x = builder.call(aten.silu.default, group_norm(builder, builder.placeholder("x", (2, 32, 6, 5)), "norm"))
    x = builder.call(aten.mul.Tensor, x, builder.buffer("factors", torch.linspace(0.2, 2, 32)[:, None, None]))
    x = builder.call(aten.constant_pad_nd.default, x, [1, 1, 1, 1], 0.0)
    graph_module = builder.build(conv(builder, quantized(builder, x, *SILU), "conv", 16, padding=0))
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 6, 5)), **LOOSE)
    (node,) = calls(result.graph_module, QUANTIZED)
    assert node.args[9] == [1, 1, 1, 1] and len(node.args) == 11
    assert not calls(result.graph_module, aten.mul.Tensor) and not calls(
        result.graph_module, OPERATORS.group_norm.default
    )


def test_one_reader_with_factors_and_one_without():
    builder = GraphBuilder()
    x = group_norm(builder, builder.placeholder("x", (2, 32, 6, 5)), "norm")
    by = builder.buffer("factors", torch.linspace(0.2, 2, 32)[:, None, None])
    scaled = builder.call(aten.mul.Tensor, x, by)
    pixels = builder.call(aten.permute.default, builder.call(aten.view.default, x, [2, 32, 30]), [0, 2, 1])
    flat = builder.call(aten.reshape.default, pixels, [-1, 32])
    flat = builder.call(aten.mul.Tensor, flat, builder.buffer("flat_factors", torch.linspace(0.5, 1, 32)))
    outputs = [conv(builder, scaled, "one", 16), conv(builder, x, "two", 16), linear(builder, flat, "three", 16)]
    graph_module = builder.build([*outputs, scaled])
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 6, 5)), **LOOSE)
    quantizers = calls(result.graph_module, QUANTIZED)
    assert sorted(len(node.args) for node in quantizers) == [10, 11, 11]
    assert len(calls(result.graph_module, OPERATORS.group_norm.default)) == 1


@pytest.mark.parametrize("parts", [(24,), (8,)])
def test_does_not_fire_where_vectors_do_not_fit(parts):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, *parts, 6, 5))
    assert unchanged(FuseGroupNorms(), builder.build(group_norm(builder, x, "norm")))


@pytest.mark.parametrize("size", [(2, 16, 0, 5), (2, 16, 6, 5)])
def test_does_not_fire_where_there_is_no_pixel_or_no_affine_part(size):
    builder = GraphBuilder()
    x = builder.placeholder("x", size)
    affine = () if all(size) else (torch.ones(16), torch.zeros(16))
    constants = [builder.parameter(f"norm.{name}", value) for name, value in zip("wb", affine, strict=False)]
    x = builder.call(aten.group_norm.default, x, 4, *(constants or (None, None)), 1e-5, False)
    assert unchanged(FuseGroupNorms(), builder.build(x))


def test_as_many_channels_as_there_are():
    builder = GraphBuilder()
    graph_module = builder.build(group_norm(builder, builder.placeholder("x", (2, 8320, 2, 3)), "norm"))
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 8320, 2, 3)), rtol=1e-4)
    assert len(calls(result.graph_module, OPERATORS.group_norm.default)) == 1


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("parts", "shift"), [((32,), None), ((32,), 0), ((16, 32), None), ((48, 16), 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics(dynamic, parts, shift, silu, factors):
    graph_module = block(dynamic=dynamic, parts=parts, shift=shift, silu=silu, factors=factors)

    def example(batch):
        images = [(batch, size, 6, 5) for size in parts]
        return values(*images, *([] if shift is None else [(shift or batch, sum(parts), 1, 1)]))

    more = [example(3)] if dynamic else []
    assert_pass_contract(FuseGroupNorms, graph_module, example(2), more_inputs=more, **LOOSE)


def test_a_norm_that_nothing_quantizes_stays_float():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 32, 6, 5))
    y = builder.call(aten.silu.default, group_norm(builder, x, "norm"))
    graph_module = builder.build([y, group_norm(builder, x, "other")])
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 6, 5)), rtol=1e-4)
    assert len(calls(result.graph_module, OPERATORS.group_norm.default)) == 2


def test_rows_of_a_sequence():
    """Attention normalizes ``[N, C, L]`` and quantizes ``[N * L, C]``."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 32, 10))
    turned = builder.call(aten.transpose.int, group_norm(builder, x, "norm"), 1, 2)
    rows = builder.call(aten.reshape.default, turned, [-1, 32])
    graph_module = builder.build(linear(builder, quantized(builder, rows), "to_q", 16))
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 10)), **LOOSE)
    assert len(calls(result.graph_module, QUANTIZED)) == 1
    assert not calls(result.graph_module, aten.group_norm.default)


def test_rows_in_another_order_are_no_rows():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 32, 32))
    rows = builder.call(aten.reshape.default, group_norm(builder, x, "norm"), [-1, 32])
    graph_module = builder.build(linear(builder, quantized(builder, rows), "to_q", 16))
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 32)), **LOOSE)
    assert not calls(result.graph_module, QUANTIZED) and calls(result.graph_module, OPERATORS.group_norm.default)


def test_several_users_of_norm_and_quantizer():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 32, 6, 5))
    y = builder.call(aten.silu.default, group_norm(builder, x, "norm"))
    once = quantized(builder, y, *SILU)
    outputs = [conv(builder, once, "wide", 16), conv(builder, once, "narrow", 16, kernel=1), y]
    outputs.append(conv(builder, quantized(builder, y, 0.025, 12), "other", 16))
    graph_module = builder.build(outputs)
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 6, 5)), **LOOSE)
    assert len(calls(result.graph_module, QUANTIZED)) == 3
    assert len(calls(result.graph_module, OPERATORS.group_norm.default)) == 1


def test_a_quantizer_that_is_read_otherwise_keeps_its_input():
    builder = GraphBuilder()
    once = quantized(builder, group_norm(builder, builder.placeholder("x", (2, 32, 6, 5)), "norm"))
    graph_module = builder.build([conv(builder, once, "conv", 16), once])
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, values((2, 32, 6, 5)), rtol=1e-3, atol=1.01)
    assert not calls(result.graph_module, QUANTIZED)


def test_a_norm_that_stands_far_from_the_output():
    builder = GraphBuilder()
    x = group_norm(builder, builder.placeholder("x", (1, 16, 2, 2)), "norm")
    for _ in range(1500):
        x = builder.call(aten.neg.default, x)
    graph_module = builder.build(x)
    assert FuseGroupNorms()(graph_module).modified
    assert len(calls(graph_module, OPERATORS.group_norm.default)) == 1
