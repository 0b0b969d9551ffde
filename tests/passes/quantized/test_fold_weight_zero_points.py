import pytest
import torch

from tests.passes.helpers import calls, unchanged
from tfmq_fx.passes import FoldWeightZeroPoints, StripDeadState
from tfmq_fx.passes.quantized.fold_weight_zero_points import fold_zero_points
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel.default


def quantized_linear(integers, zero_points, *, axis=0, high=15, dtype=torch.uint8, readers=1, **options):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    weight = builder.buffer("fc.weight_int", integers.to(dtype))
    scale = builder.buffer("fc.scale", torch.linspace(0.1, 0.9, integers.shape[axis]))
    zeros = builder.buffer("fc.zero", zero_points)
    outputs = []
    with builder.inside("fc"):
        for _ in range(readers):
            args = (weight, scale, zeros, axis, 0 if dtype == torch.uint8 else -high, high, dtype)
            outputs.append(builder.call(aten.linear.default, x, builder.call(DEQUANTIZE, *args, **options)))
    return builder.build(tuple(outputs))


INTEGERS = torch.arange(12).reshape(3, 4)
ZEROS = torch.tensor([0, 7, 15])


@pytest.mark.parametrize("axis, zero_points", [(0, ZEROS), (1, torch.tensor([3, 0, 9, 15]))])
def test_fires(axis, zero_points):
    graph_module = quantized_linear(INTEGERS, zero_points, axis=axis)
    assert FoldWeightZeroPoints()(graph_module).modified
    (node,) = calls(graph_module, DEQUANTIZE)
    weight, _, zero = (graph_module.get_buffer(str(argument.target)) for argument in node.args[:3])
    assert weight.dtype == torch.int8 and not zero.any() and zero.dtype == zero_points.dtype
    assert node.args[3:] == (axis, -128, 127, torch.int8)
    shape = (3, 1) if axis == 0 else (1, 4)
    assert torch.equal(weight.to(torch.int64), INTEGERS - zero_points.reshape(shape))
    StripDeadState()(graph_module)
    assert torch.uint8 not in {buffer.dtype for buffer in graph_module.buffers()}


@pytest.mark.parametrize(
    "integers, zero_points",
    [
        (INTEGERS, torch.zeros(3, dtype=torch.int64)),
        (torch.tensor([[0, 255]]), torch.tensor([127])),
        (torch.tensor([[0, 3]]), torch.tensor([129])),
        (INTEGERS, torch.tensor([0.5, 7.0, 15.0])),
    ],
)
def test_does_not_fire_on_zero_or_on_what_does_not_fit(integers, zero_points):
    builder = GraphBuilder()
    arguments = [builder.buffer("w", integers.to(torch.uint8)), builder.buffer("s", torch.ones(len(integers)))]
    node = builder.call(DEQUANTIZE, *arguments, builder.buffer("z", zero_points), 0, 0, 255, torch.uint8)
    assert unchanged(FoldWeightZeroPoints(), builder.build(node))


def test_does_not_fire_on_a_computed_weight_or_without_zero_points():
    builder = GraphBuilder()
    scale, zero = builder.buffer("scale", torch.ones(3)), builder.buffer("zero", ZEROS)
    weight = builder.placeholder("weight", (3, 4), torch.uint8)
    constant = builder.buffer("constant", INTEGERS.to(torch.uint8))
    computed = builder.call(DEQUANTIZE, weight, scale, zero, 0, 0, 15, torch.uint8)
    symmetric = builder.call(DEQUANTIZE, constant, scale, None, 0, 0, 15, torch.uint8)
    assert unchanged(FoldWeightZeroPoints(), builder.build((computed, symmetric)))


def test_numerics_are_exact():
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 128, (8, 4), generator=generator)
    zero_points = torch.randint(0, 128, (8,), generator=generator)
    graph_module = quantized_linear(integers, zero_points, high=127)
    assert_pass_contract(FoldWeightZeroPoints, graph_module, (torch.randn(2, 4),), exact=True)
    graph_module = quantized_linear(integers - 64, zero_points - 64, high=64, dtype=torch.int8)
    assert_pass_contract(FoldWeightZeroPoints, graph_module, (torch.randn(2, 4),), exact=True)


def test_the_output_dtype_stays():
    builder = GraphBuilder()
    arguments = [builder.buffer("w", INTEGERS.to(torch.uint8)), builder.buffer("s", torch.ones(3))]
    arguments += [builder.buffer("z", ZEROS), 0, 0, 15, torch.uint8]
    graph_module = builder.build(builder.call(DEQUANTIZE, *arguments, out_dtype=torch.bfloat16))
    result = assert_pass_contract(FoldWeightZeroPoints, graph_module, (), exact=True)
    assert result.graph_module().dtype == torch.bfloat16


def test_several_users_share_one_folded_weight():
    graph_module = quantized_linear(INTEGERS, ZEROS, readers=2)
    result = assert_pass_contract(FoldWeightZeroPoints, graph_module, (torch.randn(2, 4),), exact=True)
    first, second = calls(result.graph_module, DEQUANTIZE)
    assert [a.target for a in first.args[:3]] == [a.target for a in second.args[:3]]
    assert sum(buffer.dtype == torch.int8 for buffer in result.graph_module.buffers()) == 1


def test_folding_integers():
    assert fold_zero_points(torch.tensor([[0, 127]]), torch.tensor([127]), 0).tolist() == [[-127, 0]]
    assert fold_zero_points(torch.tensor([[0, 255]]), torch.tensor([128]), 0).tolist() == [[-128, 127]]
    assert fold_zero_points(torch.tensor([[0, 255]]), torch.tensor([127]), 0) is None
    folded = fold_zero_points(torch.full((2, 3, 1, 1), 9), torch.tensor([1, 2, 3]), 1)
    assert folded.flatten(1).tolist() == [[8, 7, 6]] * 2


def test_the_pass_needs_no_registered_operator():
    # Nothing but the graph tells the pass which operator it looks for, so importing it imports no library.
    builder = GraphBuilder()
    assert unchanged(FoldWeightZeroPoints(), builder.build(builder.placeholder("x", (2,))))
