import pytest
import torch

from tests.passes.helpers import calls, unchanged
from tfmq_fx.passes import FlattenLinearInputs
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def linear(shape, *, dynamic=False, bias=True, turned=False):
    builder = GraphBuilder(batch=shape[0], dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, *shape[1:]))
    source = builder.call(aten.transpose.int, x, 1, 2) if turned else x
    with builder.inside("attention.to_q"):
        weight = builder.weight("to_q.weight", (6, int(source.meta["val"].shape[-1])))
        arguments = (source, weight, builder.weight("to_q.bias", (6,)))[: 3 if bias else 2]
        return builder.build(builder.call(aten.linear.default, *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 4), (3, 2, 5, 4)])
def test_fires(shape, dynamic):
    graph_module = linear(shape, dynamic=dynamic)
    assert FlattenLinearInputs()(graph_module).modified
    (node,) = calls(graph_module, aten.linear.default)
    assert node.args[0].meta["val"].ndim == 2
    assert node.meta["nn_module_stack"]["attention.to_q"][0] == "attention.to_q"


@pytest.mark.parametrize("shape", [(2, 4), (4,)])
def test_does_not_fire(shape):
    assert unchanged(FlattenLinearInputs(), linear(shape))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics(dynamic, bias, turned):
    graph_module = linear((2, 5, 4), dynamic=dynamic, bias=bias, turned=turned)
    more = [(torch.randn(1, 5, 4),), (torch.randn(7, 5, 4),)] if dynamic else []
    assert_pass_contract(FlattenLinearInputs, graph_module, (torch.randn(2, 5, 4),), rtol=1e-5, more_inputs=more)


def test_several_users_of_input_weight_and_output():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 3, 4))
    weight = builder.weight("shared.weight", (4, 4))
    first = builder.call(aten.linear.default, x, weight)
    second = builder.call(aten.linear.default, first, weight)
    outputs = {"sum": builder.call(aten.add.Tensor, first, second), "first": first, "x": x}
    graph_module = builder.build(outputs)
    result = assert_pass_contract(
        FlattenLinearInputs, graph_module, (torch.randn(2, 3, 4),), rtol=1e-5, more_inputs=[(torch.randn(5, 3, 4),)]
    )
    assert len({node.args[1] for node in calls(result.graph_module, aten.linear.default)}) == 1


def test_linears_of_one_value_share_its_reshape():
    builder = GraphBuilder(dynamic_batch=True)
    x = builder.placeholder("x", (builder.batch, 3, 4))
    outputs = [builder.call(aten.linear.default, x, builder.weight(f"to_{name}.weight", (4, 4))) for name in "qkv"]
    inputs = (torch.randn(2, 3, 4),)
    result = assert_pass_contract(FlattenLinearInputs, builder.build(outputs), inputs, rtol=1e-5)
    assert len({node.args[0] for node in calls(result.graph_module, aten.linear.default)}) == 1
