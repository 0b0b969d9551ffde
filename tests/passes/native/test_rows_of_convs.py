"""Layers whose activations have a row of a table for each item, on the integer convolution; and what is added to it."""

import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import FuseResidualAdds, LowerIntegerConvs, NarrowActivations
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import conv, dequantized, linear, quantized_by_rows, weight

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
CONV, QUANTIZE = OPERATORS.integer_conv.rows, decomposed.quantize_per_channel.default
TOKENS = 5
ROWS = torch.tensor([2, 0])


def one_conv(*, dynamic=False, of_all=False, **geometry):
    """A convolution, of one row for all items where ``of_all``."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 16, 6, 7))
    rows = builder.placeholder("rows", (1 if of_all else builder.batch,), torch.int64)
    if of_all:
        rows = builder.call(aten.expand.default, rows, [builder.call(aten.sym_size.int, x, 0)])
    return builder.build(conv(builder, quantized_by_rows(builder, x, rows), "block.conv", 32, **geometry))


def one_linear(*, each=TOKENS, bias=True):
    """A linear of sequences, ``each`` rows behind another."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, TOKENS, 32))
    rows = builder.placeholder("rows", (builder.batch,), torch.int64)
    flat = builder.call(aten.reshape.default, x, [-1, 32])
    return builder.build(linear(builder, quantized_by_rows(builder, flat, rows, each=each), "to_q", 48, bias=bias))


def images(count=2, *, of_all=False, channels=16):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, 3, (1 if of_all else count,), generator=generator)
    return torch.randn(count, channels, 6, 7, generator=generator), rows


def sequences(count=2):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, TOKENS, 32, generator=generator), torch.randint(0, 3, (count,), generator=generator)


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires(dynamic, of_all):
    graph_module = one_conv(dynamic=dynamic, of_all=of_all)
    (rows,) = (node for node in graph_module.graph.nodes if node.name == "rows")
    assert LowerIntegerConvs()(graph_module).modified
    (node,) = calls(graph_module, CONV)
    assert node.args[5] is None and node.args[8] is rows
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "block.conv"]
    (quantizer,) = calls(graph_module, QUANTIZE)
    # The border is one of zeros, before the quantizer: each item has its own zero point.
    border = quantizer.args[0]
    assert border.target is aten.constant_pad_nd.default and border.args[1:] == ([1, 1, 1, 1], 0.0)
    assert set(operators(graph_module)) - {aten.expand.default, aten.sym_size.int} == {
        aten.index_select.default, QUANTIZE, aten.permute.default, aten.constant_pad_nd.default, CONV
    }  # fmt: skip


def test_a_linear_has_as_many_pixels_for_each_item():
    graph_module = one_linear()
    assert LowerIntegerConvs()(graph_module).modified
    (node,) = calls(graph_module, CONV)
    assert node.args[8].name == "rows" and tuple(node.meta["val"].shape)[1:] == (1, 1, 48)


def refused(build):
    builder = GraphBuilder()
    x, rows = builder.placeholder("x", (2, 16, 6, 6)), builder.placeholder("rows", (2,), torch.int64)
    return builder.build(build(builder, x, rows))


def signed(builder, x, rows):
    table = [builder.call(aten.index_select.default, builder.buffer(name, value), 0, rows) for name, value in (
        ("scales", torch.tensor([0.03, 0.05])), ("zeros", torch.tensor([0, 3])))]  # fmt: skip
    node = builder.call(QUANTIZE, x, *table, 0, -128, 127, torch.int8)
    return builder.call(
        aten.conv2d.default, dequantized(builder, node), weight(builder, "conv", (16, 16, 3, 3)), None, [1, 1], [1, 1]
    )


def along_channels(builder, x, rows):
    wide = [builder.call(aten.expand.default, builder.buffer(name, value), [16]) for name, value in (
        ("scales", torch.tensor([0.03])), ("zeros", torch.tensor([3])))]  # fmt: skip
    node = builder.call(QUANTIZE, x, *wide, 1, 0, 255, torch.uint8)
    return conv(builder, node, "conv", 16)


def of_two_rows(builder, x, rows):
    other = builder.placeholder("other", (2,), torch.int64)
    table = [builder.call(aten.index_select.default, builder.buffer(name, value), 0, index) for name, value, index in (
        ("scales", torch.tensor([0.03, 0.05]), rows), ("zeros", torch.tensor([0, 3]), other))]  # fmt: skip
    return conv(builder, builder.call(QUANTIZE, x, *table, 0, 0, 255, torch.uint8), "conv", 16)


REFUSED = {
    "signed bytes": signed,
    "parameters of channels": along_channels,
    "scales and zero points of two rows": of_two_rows,
    "a zero point beyond a byte": lambda builder, x, rows: conv(
        builder, quantized_by_rows(builder, x, rows, (0.03, 0.05), (256, 0)), "conv", 16
    ),
    "a negative zero point": lambda builder, x, rows: conv(
        builder, quantized_by_rows(builder, x, rows, (0.03, 0.05), (4, -1)), "conv", 16
    ),
    "a scale of zero": lambda builder, x, rows: conv(
        builder, quantized_by_rows(builder, x, rows, (0.03, 0.0), (4, 1)), "conv", 16
    ),
    "a border that its range clamps": lambda builder, x, rows: conv(
        builder, quantized_by_rows(builder, x, rows, (0.3, 0.5), (4, 200), bounds=(0, 15)), "conv", 16
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_does_not_fire(case):
    assert unchanged(LowerIntegerConvs(), refused(REFUSED[case]))


@pytest.mark.parametrize(("padding", "fires"), [(0, True), (1, False)])
def test_bytes_that_something_else_made_have_no_border(padding, fires):
    """What dequantizes them says what they stand for, but not what a border has to be quantized from."""
    builder = GraphBuilder()
    x, rows = builder.placeholder("x", (2, 16, 6, 6)), builder.placeholder("rows", (2,), torch.int64)
    node = quantized_by_rows(builder, x, rows)
    turned = builder.call(aten.transpose.int, node, 2, 3)
    back = builder.call(decomposed.dequantize_per_channel.default, turned, *node.args[1:])
    matrix = weight(builder, "conv", (16, 16, 3, 3))
    graph_module = builder.build(builder.call(aten.conv2d.default, back, matrix, None, [1, 1], [padding] * 2))
    if fires:
        example = torch.randn(2, 16, 6, 6), ROWS
        result = assert_pass_contract(LowerIntegerConvs, graph_module, example, rtol=1e-4, atol=1e-4)
        assert len(calls(result.graph_module, CONV)) == 1
    else:
        assert unchanged(LowerIntegerConvs(), graph_module)


def test_a_smaller_range_with_its_zero_points_inside_may_have_a_border():
    graph_module = refused(
        lambda builder, x, rows: conv(
            builder, quantized_by_rows(builder, x, rows, (0.3, 0.5), (8, 15), bounds=(0, 15)), "conv", 16
        )
    )
    example = torch.randn(2, 16, 6, 6), torch.tensor([1, 0])
    result = assert_pass_contract(LowerIntegerConvs, graph_module, example, rtol=1e-4, atol=1e-4)
    assert len(calls(result.graph_module, CONV)) == 1


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"bias": False}, {"kernel": 1}, {"stride": 2, "padding": 0}, {"kernel": 5}])
def test_numerics(dynamic, geometry, of_all):
    more = [images(n, of_all=of_all) for n in (1, 5)] if dynamic else []
    graph_module = one_conv(dynamic=dynamic, of_all=of_all, **geometry)
    example = images(of_all=of_all)
    assert_pass_contract(LowerIntegerConvs, graph_module, example, rtol=1e-4, atol=1e-4, more_inputs=more)


@pytest.mark.parametrize("bias", [False, True])
def test_numerics_of_linears(bias):
    more = [sequences(1), sequences(7)]
    assert_pass_contract(LowerIntegerConvs, one_linear(bias=bias), sequences(), atol=1e-4, more_inputs=more)


def test_rows_in_another_order_than_item_by_item_are_items_of_their_own():
    """``repeat`` puts all items behind each other again and again: an entry of that has a row of its own."""
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, TOKENS, 32))
    rows = builder.placeholder("rows", (builder.batch,), torch.int64)
    flat = builder.call(aten.reshape.default, builder.call(aten.transpose.int, x, 0, 1), [-1, 32])
    repeated = builder.call(aten.repeat.default, rows, [TOKENS])
    graph_module = builder.build(linear(builder, quantized_by_rows(builder, flat, repeated), "to_q", 48))
    more = [sequences(1), sequences(7)]
    result = assert_pass_contract(LowerIntegerConvs, graph_module, sequences(), atol=1e-4, more_inputs=more)
    (node,) = calls(result.graph_module, CONV)
    assert node.args[8].target is aten.repeat.default


def test_several_layers_of_one_activation_with_and_without_a_border():
    builder = GraphBuilder()
    x, rows = builder.placeholder("x", (2, 16, 6, 7)), builder.placeholder("rows", (2,), torch.int64)
    once = quantized_by_rows(builder, x, rows)
    first, second = conv(builder, once, "first", 16), conv(builder, once, "second", 32, kernel=1)
    third = conv(builder, once, "third", 16, kernel=5)
    graph_module = builder.build([first, builder.call(aten.neg.default, first), second, third, once])
    result = assert_pass_contract(LowerIntegerConvs, graph_module, images(), atol=1e-4)
    assert len(calls(result.graph_module, CONV)) == 3


def with_residual(*, dynamic=False):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 16, 6, 7))
    rows = builder.placeholder("rows", (builder.batch,), torch.int64)
    y = conv(builder, quantized_by_rows(builder, x, rows), "conv", 16)
    graph_module = builder.build(builder.call(aten.add.Tensor, y, x))
    assert LowerIntegerConvs()(graph_module).modified
    return graph_module


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_residual_is_added_in_the_kernel(dynamic):
    more = [images(5)] if dynamic else []
    graph_module = with_residual(dynamic=dynamic)
    result = assert_pass_contract(FuseResidualAdds, graph_module, images(), rtol=1e-6, more_inputs=more)
    (node,) = calls(result.graph_module, CONV)
    assert node.args[5] is not None and not calls(result.graph_module, aten.add.Tensor)


def test_a_residual_and_the_result_are_narrowed():
    graph_module = with_residual()
    FuseResidualAdds()(graph_module)
    assert NarrowActivations()(graph_module).modified
    (node,) = calls(graph_module, CONV)
    assert node.args[11] is torch.bfloat16 and node.args[5].meta["val"].dtype is torch.bfloat16
    assert node.meta["val"].dtype is torch.bfloat16
