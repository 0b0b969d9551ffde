import torch
from torch import fx

from tests.passes.helpers import calls, unchanged
from tfmq_fx.passes import NormalizeArguments
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def conv(**options):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 5, 5))
    weight, bias = builder.weight("conv.weight", (6, 4, 3, 3)), builder.weight("conv.bias", (6,))
    return builder.build(builder.call(aten.conv2d.default, x, weight=weight, bias=bias, **options))


def test_fires():
    graph_module = conv()
    assert NormalizeArguments()(graph_module).modified
    (node,) = calls(graph_module, aten.conv2d.default)
    assert [argument.name for argument in node.args] == ["x", "conv_weight", "conv_bias"] and not node.kwargs


def test_options_between_are_kept_and_gaps_take_the_default():
    graph_module = conv(stride=[2, 2], dilation=[1, 1])
    NormalizeArguments()(graph_module)
    (node,) = calls(graph_module, aten.conv2d.default)
    assert node.args[3] == [2, 2] and not any(isinstance(value, fx.Node) for value in node.kwargs.values())

    builder = GraphBuilder()
    q = builder.placeholder("q", (2, 2, 4, 8))
    mask = builder.buffer("mask", torch.zeros(4, 4))
    graph_module = builder.build(builder.call(aten.scaled_dot_product_attention.default, q, q, value=q, attn_mask=mask))
    NormalizeArguments()(graph_module)
    (node,) = calls(graph_module, aten.scaled_dot_product_attention.default)
    assert [argument.name for argument in node.args] == ["q", "q", "q", "mask"]


def test_a_gap_without_value_takes_the_schemas_default():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 6))
    running = builder.buffer("running", torch.ones(4))
    node = builder.call(aten.group_norm.default, x, 2, bias=running)
    graph_module = builder.build(node)
    result = assert_pass_contract(NormalizeArguments, graph_module, (torch.randn(2, 4, 6),), exact=True)
    (node,) = calls(result.graph_module, aten.group_norm.default)
    assert node.args[2] is None and node.args[3].name == "running"


def test_does_not_fire_without_a_node_among_the_keywords():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    y = builder.call(aten.to.dtype_layout, builder.call(aten.mean.dim, x, dim=[1]), dtype=torch.float64)
    assert unchanged(NormalizeArguments(), builder.build(y))


def test_does_not_fire_on_a_keyword_only_argument():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 4))
    size = builder.call(aten.sym_size.int, x, 0)
    assert unchanged(NormalizeArguments(), builder.build(builder.call(aten.add.Tensor, x, 2.0, alpha=size)))


def test_does_not_fire_on_a_python_function():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    assert unchanged(NormalizeArguments(), builder.build(builder.call(torch.add, x, other=x)))


def test_numerics():
    inputs = (torch.randn(2, 4, 5, 5),)
    assert_pass_contract(NormalizeArguments, conv(stride=[2, 2], padding=[1, 1]), inputs, exact=True)


def test_several_users():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    weight, bias = builder.weight("weight", (4, 4)), builder.weight("bias", (4,))
    first = builder.call(aten.linear.default, x, weight, bias=bias)
    second = builder.call(aten.linear.default, first, weight, bias=bias)
    graph_module = builder.build([first, builder.call(aten.add.Tensor, first, other=second)])
    result = assert_pass_contract(NormalizeArguments, graph_module, (torch.randn(2, 4),), exact=True)
    assert all(not node.kwargs for node in result.graph_module.graph.nodes)
    assert [node.args[2].name for node in calls(result.graph_module, aten.linear.default)] == ["bias", "bias"]
