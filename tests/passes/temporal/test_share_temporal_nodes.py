import pytest
import torch

import tfmq_fx
from tests.models import batch, small_denoiser
from tests.passes.helpers import calls, operators, unchanged
from tfmq_fx.passes import ShareTemporalNodes
from tfmq_fx.testing import GraphBuilder, assert_pass_contract

aten = torch.ops.aten


def two_embedding_layers(*, second=aten.silu.default, options=((), ())):
    """h(t), and two layers g_i behind an activation each; the sample joins in at the end."""
    builder = GraphBuilder()
    sample = builder.placeholder("sample", (3, 4))
    timestep = builder.placeholder("timestep", (3,))
    emb = builder.call(aten.mul.Tensor, builder.call(aten.unsqueeze.default, timestep, 1), builder.weight("f", (1, 8)))
    activations = [builder.call(aten.silu.default, emb, *options[0]), builder.call(second, emb, *options[1])]
    features = [
        builder.call(aten.linear.default, activation, builder.weight(f"g{i}", (4, 8)))
        for i, activation in enumerate(activations)
    ]
    return builder.build(builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, sample, features[0]), features[1]))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)


def test_fires():
    graph_module = two_embedding_layers()
    assert ShareTemporalNodes()(graph_module).modified
    assert operators(graph_module)[aten.silu.default] == 1
    first, second = calls(graph_module, aten.linear.default)
    assert first.args[0] is second.args[0]


def test_does_not_fire_on_different_operators():
    assert unchanged(ShareTemporalNodes(), two_embedding_layers(second=aten.relu.default))


def test_does_not_merge_numbers_of_different_types():
    builder = GraphBuilder()
    sample, timestep = builder.placeholder("sample", (3,)), builder.placeholder("timestep", (3,), torch.int64)
    one, two = builder.call(aten.add.Tensor, timestep, 1), builder.call(aten.add.Tensor, timestep, 1.0)
    total = builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, sample, one), two)
    assert unchanged(ShareTemporalNodes(), builder.build(total))


def test_does_not_touch_equal_nodes_outside_the_block():
    builder = GraphBuilder()
    sample, timestep = builder.placeholder("sample", (3, 4)), builder.placeholder("timestep", (3, 4))
    feature = builder.call(aten.linear.default, timestep, builder.weight("g", (4, 4)))
    one, two = builder.call(aten.silu.default, sample), builder.call(aten.silu.default, sample)
    total = builder.call(aten.add.Tensor, builder.call(aten.add.Tensor, one, two), feature)
    assert unchanged(ShareTemporalNodes(), builder.build(total))


def test_numerics():
    assert_pass_contract(ShareTemporalNodes, two_embedding_layers(), inputs(), exact=True)


def test_several_users_of_chains_of_equal_nodes():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    before = operators(captured)[aten.silu.default]
    result = assert_pass_contract(ShareTemporalNodes, captured, batch(), exact=True)
    # Both blocks apply SiLU to the one time embed; the SiLUs on images stay.
    assert operators(result.graph_module)[aten.silu.default] == before - 1


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_one_observer_serves_all_embedding_layers(temporal):
    captured = tfmq_fx.capture(small_denoiser(), batch())
    config = tfmq_fx.QuantizationConfig(temporal=temporal)
    prepared = tfmq_fx.prepare(captured, config, timesteps=torch.arange(0, 1000, 100))
    layers = tfmq_fx.find_temporal_block(prepared).embedding_layers
    assert len(layers) == 2
    assert len({layer.linear.args[0] for layer in layers}) == 1
