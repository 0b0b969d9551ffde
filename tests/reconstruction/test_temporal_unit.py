"""TIAR: the temporal block learns from its own output, over all timesteps, and nothing else is touched."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DModel

import tfmq_fx
from tests.models import TIMESTEPS, batch
from tests.reconstruction_cases import BATCHES, calibrated, same, state
from tfmq_fx import ConfigError
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    AdaRoundQuantizer,
    float_mode,
    quantizers_of,
)
from tfmq_fx.passes.analysis import evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.reconstruction.time_path import reconstruct_time_path, temporal_quantizers, temporal_unit
from tfmq_fx.temporal.domain import finite_domain

TIAR = ReconstructionConfig(granularity="none", temporal_iterations=60)


def tiar(graph, config=TIAR):
    report = tfmq_fx.reconstruct(graph, config=config, progress=False)
    (unit,) = report.units
    assert (unit.name, unit.kind) == ("temporal block", "temporal")
    return unit


def features(graph):
    """What the embedding layers give for every timestep, one tensor each."""
    block = find_temporal_block(graph)
    outputs = [layer.linear for layer in block.embedding_layers]
    return evaluate_temporal_nodes(graph, block.nodes, outputs, {"timestep": TIMESTEPS})


def feature_error(graph):
    """Relative error of all temporal features against the float model."""
    with torch.no_grad():
        quantized = torch.cat(features(graph), 1)
        with float_mode(quantizers_of(graph).values()):
            original = torch.cat(features(graph), 1)
    return float((quantized - original).norm() / original.norm())


def summed_error(graph):
    """The objective, naively: over layers, the mean over timesteps of the summed squares."""
    with torch.no_grad():
        quantized = features(graph)
        with float_mode(quantizers_of(graph).values()):
            return sum(float((q - f).square().sum()) / len(TIMESTEPS) for q, f in zip(quantized, features(graph),
                                                                                      strict=True))  # fmt: skip


def unit_of(graph):
    return temporal_unit(graph, finite_domain("timestep", {"timestep": TIMESTEPS}))


def inside_names(graph):
    return set(temporal_quantizers(graph))


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
@pytest.mark.parametrize("learned_steps", [False, True, "after"])
def test_the_error_falls_and_is_what_the_report_says(temporal, learned_steps):
    graph = calibrated(temporal=temporal)
    unit_of(graph).observe(graph)
    before = summed_error(graph)
    config = ReconstructionConfig(granularity="none", temporal_iterations=60, learned_steps=learned_steps)
    unit = tiar(graph, config)
    assert unit.before == pytest.approx(before, rel=1e-4)
    assert unit.after == pytest.approx(summed_error(graph), rel=1e-4)
    assert unit.after < 0.8 * unit.before
    assert unit.reason == "" and 0 < unit.changed < 0.5
    assert unit.weights == sum(
        quantizers_of(graph)[name].up.numel()
        for name in inside_names(graph)
        if isinstance(quantizers_of(graph)[name], AdaRoundQuantizer)
    )
    assert unit.weights == 2 * 16 * 16 + 2 * 8 * 16


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_features_are_closer_to_the_float_ones_than_without(seed):
    graph = calibrated(model_seed=seed)
    nearest = feature_error(graph)
    tiar(graph)
    assert feature_error(graph) < 0.9 * nearest


def test_training_in_bfloat16_brings_the_features_closer_too_and_leaves_no_bfloat16_behind():
    nearest, full, half = (
        feature_error(graph) for graph in (calibrated(), *(trained(p) for p in ("float32", "bfloat16")))
    )
    assert half < 0.9 * nearest
    assert half != full, "nothing was computed in bfloat16: the test would show nothing"
    dtypes = {tensor.dtype for tensor in trained("bfloat16").state_dict().values()}
    assert torch.bfloat16 not in dtypes


def trained(precision):
    graph = calibrated()
    tiar(graph, dataclasses.replace(TIAR, temporal_precision=precision))
    return graph


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_nothing_outside_the_block_is_touched(temporal):
    graph = calibrated(temporal=temporal)
    inside, before = inside_names(graph), state(graph)
    tiar(graph)
    changed = {name.rpartition(".")[0] for name, value in state(graph).items() if not torch.equal(value, before[name])}
    assert changed and changed <= inside < quantizers_of(graph).keys()


def test_a_training_that_raises_the_error_is_not_kept():
    """A step so long that the rounding ends at random, and a regulariser that freezes it there."""
    graph = calibrated()
    before = state(graph)
    unit = tiar(graph, ReconstructionConfig(granularity="none", temporal_iterations=4, learning_rate=1.0,
                                            round_weight=1e6, warmup=0.0))  # fmt: skip
    assert unit.after == unit.before and unit.changed == 0.0
    assert "error rose" in unit.reason and "rounded to nearest" in unit.reason
    assert same(state(graph), before)


@pytest.mark.parametrize("learned_steps", [False, True, "after"])
def test_an_interrupt_puts_everything_back(learned_steps):
    graph = calibrated()
    before = state(graph)

    def interrupt(iteration, loss):
        if iteration == 5:
            raise KeyboardInterrupt

    config = ReconstructionConfig(temporal_iterations=20, learned_steps=learned_steps)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_time_path(graph, unit_of(graph), config, interrupt)
    assert same(state(graph), before)
    tfmq_fx.convert(graph)


@pytest.mark.parametrize("config", [{}, {"temporal": "shared"}, {"activation_bits": 32}])
def test_the_programs_temporal_features_are_those_of_the_graph(config):
    graph = calibrated(**config)
    tiar(graph)
    program = tfmq_fx.convert(graph)
    with torch.no_grad():
        for ours, theirs in zip(features(program.graph_module), features(graph), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        inputs = batch(6, seed=3)
        assert torch.equal(program(*inputs), graph(*inputs))


def test_the_ranges_fit_the_learned_weights():
    """Observing the block once more finds the ranges as they are."""
    for temporal in ("fsc", "shared"):
        graph = calibrated(temporal=temporal)
        tiar(graph)
        before = state(graph)
        unit_of(graph).observe(graph)
        for name, value in state(graph).items():
            torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_timesteps_are_needed():
    graph = calibrated(temporal="shared", timesteps=False)
    with pytest.raises(ConfigError, match="pass timesteps="):
        tfmq_fx.reconstruct(graph, config=TIAR, progress=False)
    tfmq_fx.convert(graph)


@pytest.mark.parametrize("config", [{"temporal": "float"}, {"weight_bits": 32}])
def test_a_block_without_quantized_weights_is_left_alone_with_a_reason(config):
    graph = calibrated(**config)
    unit = tiar(graph)
    assert unit.iterations == unit.weights == 0 and unit.reason == "its weights are not quantized"
    direct = reconstruct_time_path(graph, unit_of(graph), TIAR)
    assert direct.iterations == 0 and direct.reason == unit.reason


def test_nearest_leaves_the_block_alone_with_a_reason():
    graph = calibrated()
    unit = tiar(graph, ReconstructionConfig(granularity="none", temporal="nearest"))
    assert unit.iterations == 0 and "nearest" in unit.reason
    assert all(torch.equal(q.up, q.ratio().round() - q.ratio().floor())
               for q in quantizers_of(graph).values() if isinstance(q, AdaRoundQuantizer))  # fmt: skip


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_a_timestep_for_the_whole_batch_gives_the_same(temporal):
    """Captured with a 0-dim timestep, the block is evaluated one by one; a shared range still sees them all."""
    ours, theirs = (calibrated(scalar=scalar, temporal=temporal) for scalar in (True, False))
    one, other = tiar(ours), tiar(theirs)
    assert one.before == pytest.approx(other.before, rel=1e-3)
    assert one.after < one.before
    for a, b in zip(features(ours), features(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scalar", [True, False])
def test_a_shared_range_is_that_of_all_timesteps(scalar):
    graph = calibrated(scalar=scalar, temporal="shared")
    unit_of(graph).observe(graph)
    block = find_temporal_block(graph)
    checked = 0
    for node in block.nodes:
        site = quantizers_of(graph).get(str(node.target)) if node.op == "call_module" else None
        if isinstance(site, ActivationQuantizer):
            (seen,) = evaluate_temporal_nodes(graph, block.nodes, [node.args[0]], {"timestep": TIMESTEPS})
            width = max(float(seen.max()), 0) - min(float(seen.min()), 0)
            assert float(site.scale) == pytest.approx(width / 255, rel=1e-4)
            checked += 1
    assert checked >= 3


def test_a_block_that_takes_one_timestep_only_says_so(monkeypatch):
    graph = calibrated()
    genuine = evaluate_temporal_nodes

    def one_by_one(module, members, outputs, inputs, **hooks):
        """As if each timestep alone gave something else than all together."""
        return [value * (1 + index) for index, value in
                enumerate(genuine(module, members, outputs, inputs, **hooks))]  # fmt: skip

    monkeypatch.setattr("tfmq_fx.reconstruction.domain_training.evaluate_temporal_nodes", one_by_one)
    with pytest.raises(ReconstructionError, match="cannot be evaluated for all timesteps at once") as caught:
        reconstruct_time_path(graph, unit_of(graph), TIAR)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).eval()
    return tfmq_fx.capture(model, (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])))


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_a_diffusers_unet(unet, temporal):
    config = tfmq_fx.QuantizationConfig(weight_bits=4, temporal=temporal)
    graph = tfmq_fx.prepare(unet, config, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, BATCHES, progress=False)
    unit = tiar(graph)
    assert unit.after < 0.8 * unit.before and unit.reason == ""
    program = tfmq_fx.convert(graph)
    with torch.no_grad():
        for ours, theirs in zip(features(program.graph_module), features(graph), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
