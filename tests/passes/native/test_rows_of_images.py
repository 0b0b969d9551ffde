"""What quantizes images by a row of a table for each item, on the kernels of norms and images."""

import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import FuseGroupNorms, FuseQuantizedImages, LowerIntegerConvs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import conv, group_norm, linear, quantized_by_rows

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
NORM, IMAGE, CONV = OPERATORS.quantized_group_norm.rows, OPERATORS.quantized_image.rows, OPERATORS.integer_conv.rows
SILU = (0.02, 0.03, 0.025), (14, 10, 0)
#: A rounding that turned is one step of one activation.
LOOSE = {"rtol": 1e-3, "atol": 4e-2}
TOKENS = 10


def two_inputs(builder, channels=32, space=(6, 5)):
    x = builder.placeholder("x", (builder.batch, channels, *space))
    return x, builder.placeholder("rows", (builder.batch,), torch.int64)


def drawn(count=2, channels=32, space=(6, 5), items=None):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, 3, (count if items is None else items,), generator=generator)
    return torch.randn(count, channels, *space, generator=generator), rows


def block(*, dynamic=False, silu=True, kernel=3, bounds=(0, 255)):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x, rows = two_inputs(builder)
    y = group_norm(builder, x, "block.norm")
    y = builder.call(aten.silu.default, y) if silu else y
    once = quantized_by_rows(builder, y, rows, *(SILU if silu else ()), bounds=bounds)
    graph_module = builder.build(conv(builder, once, "block.conv", 16, kernel=kernel))
    assert LowerIntegerConvs()(graph_module).modified
    return graph_module


def test_a_norm_fires():
    graph_module = block()
    assert FuseGroupNorms()(graph_module).modified
    (node,) = calls(graph_module, NORM)
    assert node.args[9].name == "rows" and node.args[10] == [1, 1, 1, 1]
    assert [table.op for table in node.args[7:9]] == ["get_attr"] * 2
    assert list(node.meta["nn_module_stack"]) == ["L__self__", "block.norm"]
    assert set(operators(graph_module)) == {aten.permute.default, NORM, CONV}


def test_a_norm_whose_quantizer_is_none_of_bytes_stays_float():
    graph_module = block(bounds=(0, 127))
    assert FuseGroupNorms()(graph_module).modified
    assert not calls(graph_module, NORM) and len(calls(graph_module, OPERATORS.group_norm.default)) == 1


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics_of_norms(dynamic, kernel, silu):
    more = [drawn(n) for n in (1, 5)] if dynamic else []
    graph_module = block(dynamic=dynamic, silu=silu, kernel=kernel)
    result = assert_pass_contract(FuseGroupNorms, graph_module, drawn(), more_inputs=more, **LOOSE)
    assert len(calls(result.graph_module, NORM)) == 1


def sequence(rows_of, *, items=None, space=(TOKENS,)):
    """Attention normalizes ``[N, C, L]`` and quantizes ``[N * L, C]``, by what ``rows_of`` makes of the rows."""
    builder = GraphBuilder(dynamic_batch=items is None)
    x = builder.placeholder("x", (builder.batch, 32, *space))
    rows = builder.placeholder("rows", (builder.batch if items is None else items,), torch.int64)
    turned = builder.call(aten.transpose.int, group_norm(builder, x, "norm"), 1, 2)
    flat = builder.call(aten.reshape.default, turned, [-1, 32])
    graph_module = builder.build(linear(builder, rows_of(builder, flat, rows), "to_q", 16))
    assert LowerIntegerConvs()(graph_module).modified
    return graph_module


def test_rows_of_a_sequence():
    graph_module = sequence(lambda builder, flat, rows: quantized_by_rows(builder, flat, rows, each=TOKENS))
    more = [drawn(n, space=(TOKENS,)) for n in (1, 5)]
    example = drawn(space=(TOKENS,))
    result = assert_pass_contract(FuseGroupNorms, graph_module, example, more_inputs=more, **LOOSE)
    assert len(calls(result.graph_module, NORM)) == 1 and not calls(result.graph_module, aten.group_norm.default)
    assert not calls(result.graph_module, decomposed.quantize_per_channel.default)


@pytest.mark.parametrize("dynamic", [False, True])
def test_pixels_with_rows_of_their_own_are_no_items(dynamic):
    """A norm's kernel has a quantizer for an image, and none for its pixels; the norm stays in float."""

    def turned(builder, flat, rows):
        return quantized_by_rows(builder, flat, builder.call(aten.repeat.default, rows, [TOKENS]) if dynamic else rows)

    graph_module = sequence(turned, items=None if dynamic else 2 * TOKENS)
    example = drawn(space=(TOKENS,), items=None if dynamic else 2 * TOKENS)
    result = assert_pass_contract(FuseGroupNorms, graph_module, example, **LOOSE)
    assert not calls(result.graph_module, NORM) and calls(result.graph_module, OPERATORS.group_norm.default)


def test_several_users_of_a_norm_and_its_quantizers():
    builder = GraphBuilder()
    x, rows = two_inputs(builder)
    y = builder.call(aten.silu.default, group_norm(builder, x, "norm"))
    once, other = quantized_by_rows(builder, y, rows, *SILU), quantized_by_rows(builder, y, rows, (0.025, 0.03), (9, 1))
    outputs = [conv(builder, once, "wide", 16), conv(builder, once, "narrow", 16, kernel=1), y]
    outputs += [conv(builder, once, "wider", 16, kernel=5), conv(builder, other, "other", 16)]
    graph_module = builder.build(outputs)
    LowerIntegerConvs()(graph_module)
    x, _ = drawn()
    result = assert_pass_contract(FuseGroupNorms, graph_module, (x, torch.tensor([1, 0])), **LOOSE)
    paddings = sorted(node.args[10] for node in calls(result.graph_module, NORM))
    assert paddings == [[0] * 4, [1] * 4, [1] * 4, [2] * 4]
    assert len(calls(result.graph_module, OPERATORS.group_norm.default)) == 1


def test_rows_that_are_known_only_after_the_norm():
    """A kernel stands where all that it reads is there."""
    builder = GraphBuilder()
    x, rows = two_inputs(builder)
    y = group_norm(builder, x, "norm")
    groups = builder.buffer("groups", torch.tensor([2, 1, 0]))
    later = builder.call(aten.index_select.default, groups, 0, rows)
    graph_module = builder.build(conv(builder, quantized_by_rows(builder, y, later), "conv", 16))
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseGroupNorms, graph_module, drawn(), **LOOSE)
    assert len(calls(result.graph_module, NORM)) == 1


def sampler(kind, *, dynamic=False):
    builder = GraphBuilder(dynamic_batch=dynamic)
    x, rows = two_inputs(builder, 16, (4, 6))
    geometry = {"plain": {}, "point": {"kernel": 1}, "up": {}, "down": {"stride": 2, "padding": 0}}[kind]
    if kind == "up":
        x = builder.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    if kind == "down":
        x = builder.call(aten.pad.default, x, [0, 1, 0, 1], "constant", 0.0)
    graph_module = builder.build(conv(builder, quantized_by_rows(builder, x, rows), "sampler.conv", 16, **geometry))
    assert LowerIntegerConvs()(graph_module).modified
    return graph_module


@pytest.mark.parametrize(
    ("kind", "enlarge", "padding"),
    [("plain", 1, [1, 1, 1, 1]), ("point", 1, [0] * 4), ("up", 2, [1, 1, 1, 1]), ("down", 1, [0, 0, 1, 1])],
)
def test_an_image_fires(kind, enlarge, padding):
    graph_module = sampler(kind)
    assert FuseQuantizedImages()(graph_module).modified
    (node,) = calls(graph_module, IMAGE)
    assert node.args[1] == enlarge and node.args[4].name == "rows" and node.args[5] == padding
    assert set(operators(graph_module)) == {aten.permute.default, IMAGE, CONV}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["plain", "point", "up", "down"])
def test_numerics_of_images(kind, dynamic):
    more = [drawn(5, 16, (4, 6))] if dynamic else []
    graph_module, example = sampler(kind, dynamic=dynamic), drawn(2, 16, (4, 6))
    assert_pass_contract(FuseQuantizedImages, graph_module, example, exact=True, more_inputs=more)


def test_an_image_does_not_fire_where_something_else_reads_the_bytes_or_they_are_none():
    builder = GraphBuilder()
    x, rows = two_inputs(builder, 16, (4, 6))
    nodes = [quantized_by_rows(builder, x, rows), quantized_by_rows(builder, x, rows, bounds=(0, 127))]
    nodes.append(quantized_by_rows(builder, x, rows, (0.1, 0.2, 0.3), (0, 256, 3)))
    turned = [builder.call(aten.permute.default, node, [0, 2, 3, 1]) for node in nodes]
    assert unchanged(FuseQuantizedImages(), builder.build([*turned, nodes[0]]))


def test_several_users_of_image_and_bytes():
    builder = GraphBuilder()
    x, rows = two_inputs(builder, 16, (4, 6))
    up = builder.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    once = quantized_by_rows(builder, up, rows)
    outputs = [conv(builder, once, "wide", 16), conv(builder, once, "narrow", 16, kernel=1), up]
    graph_module = builder.build(outputs)
    LowerIntegerConvs()(graph_module)
    result = assert_pass_contract(FuseQuantizedImages, graph_module, drawn(2, 16, (4, 6)), exact=True)
    assert sorted(node.args[5] for node in calls(result.graph_module, IMAGE)) == [[0] * 4, [1] * 4]
