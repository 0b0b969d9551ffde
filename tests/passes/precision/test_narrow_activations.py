import pytest
import torch

from tests.passes.helpers import calls, unchanged
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes import (
    FuseGroupNorms,
    FuseQuantizedImages,
    FuseResidualAdds,
    LowerIntegerAttention,
    LowerIntegerConvs,
    NarrowActivations,
)
from tfmq_fx.testing import GraphBuilder, assert_pass_contract
from tfmq_fx.testing.quantized_layers import SILU, attention, conv, group_norm, linear, quantized

aten = torch.ops.aten
CONV = OPERATORS.integer_conv.default
#: bfloat16 has 8 bits: 2^-9 of each value, which may also turn roundings behind it.
LOOSE = {"rtol": 2e-2, "atol": 1e-1}
SHAPE = (16, 6, 5)


def lowered(builder, output):
    graph_module = builder.build(output)
    for rewrite in (LowerIntegerConvs, LowerIntegerAttention, FuseGroupNorms, FuseQuantizedImages, FuseResidualAdds):
        rewrite()(graph_module)
    return graph_module


def block(*, dynamic=False):
    """conv -> GroupNorm -> SiLU -> conv + residual, twice read."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, *SHAPE))
    first = conv(builder, x, "first", 16)
    normalized = builder.call(aten.silu.default, group_norm(builder, first, "norm"))
    second = builder.call(aten.add.Tensor, x, conv(builder, quantized(builder, normalized, *SILU), "second", 16))
    return lowered(builder, [second, conv(builder, second, "third", 16)])


def casts(graph_module):
    return [node.args[1] for node in calls(graph_module, aten.to.dtype)]


def test_fires():
    graph_module = block()
    assert NarrowActivations()(graph_module).modified
    assert {node.meta["val"].dtype for node in calls(graph_module, CONV)} == {torch.bfloat16}
    # The input of the residual is narrowed, the two outputs are widened; nothing is cast between kernels.
    assert casts(graph_module).count(torch.bfloat16) == 1 and casts(graph_module).count(torch.float32) == 2
    (norm,) = calls(graph_module, OPERATORS.quantized_group_norm.default)
    assert norm.args[0][0].meta["val"].dtype == torch.bfloat16


def test_does_not_fire_without_integer_convolutions():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, *SHAPE))
    assert unchanged(NarrowActivations(), lowered(builder, [group_norm(builder, x, "norm"), x]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics(dynamic):
    more = [(torch.randn(5, *SHAPE),)] if dynamic else []
    graph_module = block(dynamic=dynamic)
    assert_pass_contract(NarrowActivations, graph_module, (torch.randn(2, *SHAPE),), more_inputs=more, **LOOSE)


def test_a_concatenation_of_narrow_and_wide_is_narrow():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, *SHAPE))
    joined = builder.call(aten.cat.default, [conv(builder, x, "first", 16), x], 1)
    normalized = quantized(builder, group_norm(builder, joined, "norm"))
    graph_module = lowered(builder, conv(builder, normalized, "second", 16))
    result = assert_pass_contract(NarrowActivations, graph_module, (torch.randn(2, *SHAPE),), **LOOSE)
    (norm,) = calls(result.graph_module, OPERATORS.quantized_group_norm.default)
    assert {part.meta["val"].dtype for part in norm.args[0]} == {torch.bfloat16}


def test_attention_takes_three_narrow_inputs():
    builder = GraphBuilder()
    x = builder.placeholder("x", (10, 16))
    heads = []
    for name in ("to_q", "to_k", "to_v"):
        rows = builder.call(aten.view.default, linear(builder, x, name, 16), [2, 5, 2, 8])
        heads.append(builder.call(aten.transpose.int, rows, 1, 2))
    graph_module = lowered(builder, attention(builder, *heads))
    result = assert_pass_contract(NarrowActivations, graph_module, (torch.randn(10, 16),), **LOOSE)
    (node,) = calls(result.graph_module, OPERATORS.integer_attention.default)
    assert {operand.meta["val"].dtype for operand in node.args[:3]} == {torch.bfloat16}


def test_several_users_of_one_result():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, *SHAPE))
    first = conv(builder, x, "first", 16)
    outputs = [first, builder.call(aten.neg.default, first), conv(builder, first, "second", 16)]
    outputs.append(builder.call(aten.add.Tensor, first, conv(builder, first, "third", 16)))
    graph_module = lowered(builder, outputs)
    result = assert_pass_contract(NarrowActivations, graph_module, (torch.randn(2, *SHAPE),), **LOOSE)
    assert all(node.args[7] == torch.bfloat16 for node in calls(result.graph_module, CONV))
