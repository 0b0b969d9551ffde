import pytest
import torch

from tests.passes.helpers import operators, unchanged
from tfmq_fx.passes import RemoveNoopCasts
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten

IDLE = [
    (aten.to.dtype, (torch.float32,), {}),
    (aten.to.dtype, (torch.float32, False, True), {}),
    (aten.to.dtype_layout, (), {"dtype": torch.float32, "layout": torch.strided}),
    (aten.to.device, ("cpu", torch.float32), {}),
    (aten._to_copy.default, (), {"dtype": torch.float32}),
    (aten.alias.default, (), {}),
    (aten.detach.default, (), {}),
    (aten.lift_fresh_copy.default, (), {}),
    (aten.contiguous.default, (), {}),
    (torch.ops.prims.convert_element_type.default, (torch.float32,), {}),
]


def graph(target, args=(), kwargs=None, *, dynamic=False, turned=False):
    builder = GraphBuilder(batch=3, dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4, 5))
    source = builder.call(aten.transpose.int, x, 1, 2) if turned else builder.call(aten.silu.default, x)
    cast = builder.call(target, source, *args, **(kwargs or {}))
    return builder.build(builder.call(aten.sin.default, cast))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("target, args, kwargs", IDLE)
def test_fires(target, args, kwargs, dynamic):
    graph_module = graph(target, args, kwargs, dynamic=dynamic)
    assert RemoveNoopCasts()(graph_module).modified
    assert operators(graph_module) == {aten.silu.default: 1, aten.sin.default: 1}


def test_fires_on_a_cast_to_another_tensors_dtype():
    builder = GraphBuilder()
    x, y = builder.placeholder("x", (2, 4)), builder.placeholder("y", (3,))
    graph_module = builder.build(builder.call(aten.to.other, x, y))
    assert RemoveNoopCasts()(graph_module).modified
    assert not operators(graph_module)


@pytest.mark.parametrize(
    "target, args, turned",
    [
        (aten.to.dtype, (torch.bfloat16,), False),
        (aten.to.dtype, (torch.float64,), False),
        (aten.contiguous.default, (), True),
        (aten.clone.default, (), False),
    ],
)
def test_does_not_fire(target, args, turned):
    assert unchanged(RemoveNoopCasts(), graph(target, args, turned=turned))


def test_does_not_fire_on_a_cast_to_another_memory_format():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4, 3, 3))
    cast = builder.call(aten.contiguous.default, x, memory_format=torch.channels_last)
    assert unchanged(RemoveNoopCasts(), builder.build(cast))


@pytest.mark.parametrize("target, args, kwargs", IDLE)
def test_numerics(target, args, kwargs):
    graph_module = graph(target, args, kwargs, dynamic=True)
    more = [(torch.randn(1, 4, 5),), (torch.randn(7, 4, 5),)]
    assert_pass_contract(RemoveNoopCasts, graph_module, (torch.randn(3, 4, 5),), exact=True, more_inputs=more)


def test_several_users_and_a_round_trip_that_rounds():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    idle = builder.call(aten.to.dtype, x, torch.float32)
    half = builder.call(aten.to.dtype, idle, torch.bfloat16)
    back = builder.call(aten.to.dtype, half, torch.float32)
    graph_module = builder.build((builder.call(aten.add.Tensor, idle, back), idle, back))
    result = assert_pass_contract(RemoveNoopCasts, graph_module, (torch.randn(2, 4),), exact=True)
    assert operators(result.graph_module)[aten.to.dtype] == 2
