import copy

import pytest
import torch

from tests.passes.helpers import unchanged
from tfmq_fx.passes import IndexTimesteps, PassError, WidenTimesteps
from tfmq_fx.passes.temporal.widen_timesteps import integer_reader
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten
WHOLE = torch.tensor([0, 7, 999])


def graph(build, dtype=torch.int64):
    """``build(builder, timestep)`` behind a timestep of three items."""
    builder = GraphBuilder()
    return builder.build(build(builder, builder.placeholder("timestep", (3,), dtype)))


def sinusoid(builder, t):
    """As diffusers does it: times a tensor of ones, an axis, a float, frequencies."""
    column = builder.call(
        aten.unsqueeze.default, builder.call(aten.mul.Tensor, t, builder.call(aten.ones_like.default, t)), 1
    )
    return builder.call(
        aten.sin.default, builder.call(aten.mul.Tensor, builder.call(aten.to.dtype, column, torch.float32), 0.1)
    )


def dtypes(graph_module):
    return {node.name: node.meta["val"].dtype for node in graph_module.graph.nodes if node.op != "output"}


def test_fires():
    graph_module = graph(sinusoid)
    assert WidenTimesteps()(graph_module).modified
    assert set(dtypes(graph_module).values()) == {torch.float32}
    t = torch.tensor([908.18, 0.5, 3.0])
    assert torch.equal(graph_module(t), (t[:, None] * 0.1).sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_fire_where_the_timestep_is_a_float(dtype):
    assert unchanged(WidenTimesteps(), graph(sinusoid, dtype))
    assert unchanged(WidenTimesteps(timestep="t"), graph(sinusoid))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_numerics(dtype):
    graph_module = graph(sinusoid, dtype)
    wanted = copy.deepcopy(graph_module)(WHOLE.to(dtype))
    WidenTimesteps()(graph_module)
    assert torch.equal(graph_module(WHOLE.float()), wanted)
    graph_module.graph.lint()
    assert unchanged(WidenTimesteps(), graph_module)


def test_several_users_are_all_looked_at():
    def build(builder, t):
        weight = builder.buffer("weight", torch.eye(1000)[:, :4].contiguous())
        return sinusoid(builder, t), builder.call(aten.embedding.default, weight, t)

    graph_module = graph(build)
    before = dtypes(graph_module)
    assert integer_reader(graph_module).target is aten.embedding.default
    with pytest.raises(PassError, match=r"embedding.* takes 'timestep' as an integer; capture the model with a float"):
        WidenTimesteps()(graph_module)
    assert dtypes(graph_module) == before


def test_a_lookup_stays_a_lookup():
    graph_module = graph(sinusoid)
    IndexTimesteps([999, 7, 0])(graph_module)
    assert WidenTimesteps()(graph_module).modified
    kinds = dtypes(graph_module)
    assert kinds["timestep"] == torch.float32 and kinds["timestep_row_default"] == torch.int64


@pytest.mark.parametrize(
    "read",
    [
        lambda b, t: b.call(aten.to.dtype, t, torch.int32),
        lambda b, t: b.call(aten.to.dtype, b.call(aten.floor_divide.default, t, 10), torch.float32),
        lambda b, t: b.call(aten.remainder.Scalar, t, 10),
        lambda b, t: t,
        lambda b, t: b.call(aten.to.dtype, b.call(aten.bitwise_and.Scalar, t, 1), torch.float32),
        lambda b, t: b.call(aten.mul.Tensor, t, b.buffer("halves", torch.ones(3, dtype=torch.float16))),
    ],
    ids=["a cast", "floor division", "a remainder", "an output", "bits", "another float"],
)
def test_what_needs_integers_is_found(read):
    assert integer_reader(graph(read)) is not None
