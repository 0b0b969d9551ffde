import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import ComputeInFloat32, PassError
from tfmq_fx.passes.precision.compute_in_float32 import foreign_dtypes
from tfmq_fx.testing import GraphBuilder

aten = torch.ops.aten
NARROW = [torch.bfloat16, torch.float16]


def layers(dtype, *, dynamic=False, shared=False):
    """A layer in ``dtype``, a norm in float32, a second layer in ``dtype``; the sample and the result are of it too."""
    builder = GraphBuilder(dynamic_batch=dynamic)
    x = builder.placeholder("x", (builder.batch, 4), dtype)
    scale = builder.placeholder("scale", (1,))
    generator = torch.Generator().manual_seed(0)
    names = ("a.weight", "a.weight") if shared else ("a.weight", "b.weight")
    weights = {name: torch.randn(4, 4, generator=generator).to(dtype) for name in names}
    reads = [builder.parameter(name, value) for name, value in weights.items()]
    h = builder.call(aten.linear.default, x, reads[0])
    wide = builder.call(aten.layer_norm.default, builder.call(aten.to.dtype, h, torch.float32), [4])
    wide = builder.call(aten.mul.Tensor, wide, scale)
    narrow = builder.call(aten._to_copy.default, wide, dtype=dtype)
    shift = builder.call(aten.full.default, [4], -1e300 if dtype is torch.float64 else 0.5, dtype=dtype)
    y = builder.call(aten.linear.default, narrow, reads[-1])
    return builder.build((builder.call(aten.maximum.default, y, shift), wide, builder.call(aten.sym_size.int, x, 0)))


def inputs(dtype, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, generator=generator).to(dtype), torch.tensor([1.5])


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_fires(dtype):
    graph_module = layers(dtype)
    assert dtype in foreign_dtypes(graph_module)
    assert ComputeInFloat32()(graph_module).modified
    inside = [node.meta["val"] for node in calls(graph_module, aten.linear.default)]
    assert [value.dtype for value in inside] == [torch.float32] * 2
    assert {value.dtype for value in graph_module.state_dict().values()} == {torch.float32}
    first, second = calls(graph_module, aten.to.dtype)[0], graph_module.graph.output_node().args[0][0]
    assert first.args[0].op == "placeholder" and second.args[1] is dtype
    x, scale = inputs(dtype)
    narrow, wide, _ = graph_module(x, scale)
    assert narrow.dtype is dtype and wide.dtype is torch.float32
    assert not ComputeInFloat32()(graph_module).modified


def test_does_not_fire_on_float32_or_where_no_layer_computes_in_another_type():
    assert unchanged(ComputeInFloat32(), layers(torch.float32))
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4))
    angles = builder.call(aten.sin.default, builder.call(aten.to.dtype, x, torch.float64))
    y = builder.call(aten.to.dtype, angles, torch.float32)
    assert unchanged(
        ComputeInFloat32(), builder.build(builder.call(aten.linear.default, y, builder.weight("w", (3, 4))))
    )


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("dynamic", [False, True])
def test_numerics_are_those_of_float32_on_the_rounded_values(dtype, dynamic):
    graph_module, like = layers(dtype, dynamic=dynamic), layers(torch.float32, dynamic=dynamic)
    like.load_state_dict({name: value.float() for name, value in graph_module.state_dict().items()})
    ComputeInFloat32()(graph_module)
    for batch in (2, 5) if dynamic else (2,):
        x, scale = inputs(dtype, batch)
        found, wide, size = graph_module(x, scale)
        wanted, like_wide, _ = like(x.float(), scale)
        wanted = wanted if dtype is not torch.float64 else torch.maximum(wanted, torch.tensor(-3.4e38))
        assert size == batch and torch.equal(wide, like_wide)
        if dtype is not torch.float64:
            assert torch.equal(found, wanted.to(dtype))


def test_a_weight_of_several_users_is_copied_once():
    graph_module = layers(torch.bfloat16, shared=True)
    ComputeInFloat32()(graph_module)
    first, second = (node.args[1] for node in calls(graph_module, aten.linear.default))
    assert first.target == second.target and len(graph_module.state_dict()) == 1


def test_what_reads_bits_is_refused_by_name():
    builder = GraphBuilder()
    x = builder.placeholder("x", (2, 4), torch.bfloat16)
    weight = builder.parameter("w", torch.ones(3, 4, dtype=torch.bfloat16))
    y = builder.call(aten.view.dtype, builder.call(aten.linear.default, x, weight), torch.int16)
    with pytest.raises(PassError, match=r"node 'view_dtype' reads the bits"):
        ComputeInFloat32()(builder.build(y))


def test_operators_stay_the_same():
    graph_module = layers(torch.bfloat16)
    before = operators(graph_module)
    ComputeInFloat32()(graph_module)
    assert operators(graph_module) - before == {aten.to.dtype: 2}
