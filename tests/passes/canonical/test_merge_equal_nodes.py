import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import MergeEqualNodes
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def repeated():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 3, 4))
    weight = [builder.weight("shared.weight", (4, 4)), builder.read("shared.weight")]
    rows = [builder.call(aten.reshape.default, x, [-1, 4]) for _ in range(2)]
    outputs = [builder.call(aten.linear.default, r, w) for r, w in zip(rows, weight, strict=True)]
    return builder.build(builder.call(aten.add.Tensor, *outputs))


def test_fires():
    graph_module = repeated()
    assert MergeEqualNodes()(graph_module).modified
    assert operators(graph_module) == {aten.reshape.default: 1, aten.linear.default: 1, aten.add.Tensor: 1}
    (total,) = calls(graph_module, aten.add.Tensor)
    assert total.args[0] is total.args[1]


def test_does_not_fire_on_other_arguments_or_on_random_numbers():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    nodes = [builder.call(aten.mul.Tensor, x, factor) for factor in (1, 1.0, True, 2)]
    nodes += [builder.call(aten.rand_like.default, x) for _ in range(2)]
    nodes += [builder.call(aten.sum.dim_IntList, x, [1], keepdim=keep) for keep in (False, True)]
    assert unchanged(MergeEqualNodes(), builder.build(nodes))


def test_does_not_merge_what_writes():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    copies = [builder.call(aten.mul.Tensor, x, factor) for factor in (1, 2)]
    nodes = [builder.call(aten.add_.Tensor, copies[0], 1) for _ in range(2)]
    assert unchanged(MergeEqualNodes(), builder.build([*nodes, *copies]))


def test_numerics():
    assert_pass_contract(MergeEqualNodes, repeated(), (torch.randn(2, 3, 4),), exact=True)


def test_several_users_and_both_in_the_output():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    first, second, third = (builder.call(aten.neg.default, x) for _ in range(3))
    outputs = {"first": first, "second": second, "sum": builder.call(aten.add.Tensor, second, third)}
    result = assert_pass_contract(MergeEqualNodes, builder.build(outputs), (torch.randn(2, 4),), exact=True)
    assert len(calls(result.graph_module, aten.neg.default)) == 1
