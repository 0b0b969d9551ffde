import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import RemoveIdentityArithmetic
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten
VALUES = torch.tensor([[-0.0, 0.0, float("inf"), float("nan")], [-1e-45, 3e38, -float("inf"), 1.5]])


def graph(target, *args, dtype=torch.float32):
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4), dtype)
    return builder.build(builder.call(aten.neg.default, builder.call(target, x, *args)))


IDENTITIES = [
    (target, one) for target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) for one in (1, 1.0)
]


@pytest.mark.parametrize("target, one", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fires(target, one, dtype):
    graph_module = graph(target, one, dtype=dtype)
    assert RemoveIdentityArithmetic()(graph_module).modified
    assert operators(graph_module) == {aten.neg.default: 1}


@pytest.mark.parametrize(
    "target, args, dtype",
    [
        (aten.mul.Tensor, (2.0,), torch.float32),
        (aten.div.Tensor, (-1,), torch.float32),
        (aten.mul.Tensor, (True,), torch.float32),
        (aten.add.Tensor, (0,), torch.float32),
        (aten.div.Tensor, (1,), torch.int64),
        (aten.mul.Tensor, (1.0,), torch.int64),
    ],
)
def test_does_not_fire(target, args, dtype):
    assert unchanged(RemoveIdentityArithmetic(), graph(target, *args, dtype=dtype))


def test_does_not_fire_on_a_tensor_of_ones():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    ones = builder.call(aten.ones.default, [2, 4])
    assert unchanged(RemoveIdentityArithmetic(), builder.build(builder.call(aten.mul.Tensor, x, ones)))


@pytest.mark.parametrize("target, one", IDENTITIES)
def test_numerics_of_zeros_infinities_and_denormals(target, one):
    assert_pass_contract(RemoveIdentityArithmetic, graph(target, one), (VALUES,), exact=True)


def test_several_users():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    one = builder.call(aten.div.Tensor, builder.call(aten.mul.Tensor, x, 1), 1.0)
    outputs = [builder.call(aten.add.Tensor, one, one), builder.call(aten.mul.Tensor, one, 2), one]
    result = assert_pass_contract(RemoveIdentityArithmetic, builder.build(outputs), (VALUES,), exact=True)
    (add,) = calls(result.graph_module, aten.add.Tensor)
    assert [node.name for node in add.args] == ["x", "x"]
    assert operators(result.graph_module) == {aten.add.Tensor: 1, aten.mul.Tensor: 1}


@pytest.mark.parametrize("changed", ["product", "operand"])
def test_does_not_fire_where_memory_is_written_to(changed):
    """The product has memory of its own: without it, a write into one would be seen in the other."""
    builder = GraphBuilder()
    h = builder.call(aten.sin.default, builder.placeholder("x", (2, 4)))
    product = builder.call(aten.mul.Tensor, h, 1.0)
    builder.call(aten.relu_.default, builder.call(aten.view.default, product if changed == "product" else h, [4, 2]))
    graph_module = builder.build((h, product))
    assert unchanged(RemoveIdentityArithmetic(), graph_module)
