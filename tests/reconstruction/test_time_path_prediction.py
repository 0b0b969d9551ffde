"""The temporal block rounded by what the model's result does with the errors of its features."""

import itertools
import logging

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS
from tests.reconstruction_cases import BATCHES, SCALAR_BATCHES, calibrated, same, sentence, state
from tfmq_fx import ConfigError
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, float_mode, quantizers_of
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.reconstruction import time_path_prediction
from tfmq_fx.reconstruction.between_timesteps import timesteps_between
from tfmq_fx.reconstruction.float_graph import float_graph
from tfmq_fx.reconstruction.joint_rounding import JointLayer, round_alone, round_together
from tfmq_fx.reconstruction.output_probes import output_probes
from tfmq_fx.reconstruction.samples import gather_samples

PREDICTION = ReconstructionConfig(granularity="none", temporal_objective="prediction")


def rounded(graph, batches=BATCHES, **options):
    config = ReconstructionConfig(**{"granularity": "none", "temporal_objective": "prediction", **options})
    (unit,) = tfmq_fx.reconstruct(graph, batches, config, progress=False).units
    return unit


def moved(graph):
    """How far the result moves, squared, with every quantizer on against those of the temporal block alone."""
    inside = set(find_temporal_block(graph).nodes)
    outside = [
        module for name, module in quantizers_of(graph).items() if not any(str(node.target) == name for node in inside)
    ]
    total = 0.0
    with torch.no_grad(), float_mode(outside):
        for sample, timestep in BATCHES:
            quantized = graph(sample, timestep)
            with float_mode(quantizers_of(graph).values()):
                total += float((quantized - graph(sample, timestep)).square().sum())
    return total


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_the_result_moves_less(temporal):
    graph = calibrated(temporal=temporal)
    unit = rounded(graph)
    by_features = calibrated(temporal=temporal)
    rounded(by_features, temporal_objective="features", temporal_iterations=60)
    assert unit.reason == "" and unit.after < 0.2 * unit.before
    assert moved(graph) < moved(by_features)


def test_a_seed_is_a_draw():
    one, again, other = (calibrated() for _ in range(3))
    rounded(one)
    rounded(again)
    rounded(other, seed=1)
    assert same(state(one), state(again)) and not same(state(one), state(other))


def test_it_is_the_default_where_there_are_batches(caplog):
    default, asked, without = (calibrated() for _ in range(3))
    rounded(default, temporal_objective=None)
    rounded(asked)
    assert same(state(default), state(asked))
    unit = rounded(without, [], temporal_objective=None, temporal_iterations=8)
    assert unit.iterations == 8
    with pytest.raises(ConfigError, match="pass them to reconstruct") as caught:
        rounded(calibrated(), [])
    sentence(caught)
    assert ReconstructionConfig().resolved_temporal_objective == "prediction"
    for by_features in ({"method": "gptq"}, {"learned_steps": True}, {"temporal": "blocks"}):
        assert ReconstructionConfig(**by_features).resolved_temporal_objective == "features"


@pytest.mark.parametrize("wrong", [{"learned_steps": True}, {"temporal": "nearest"}])
def test_it_goes_with_tiar_and_trains_nothing(wrong):
    with pytest.raises(ConfigError, match="temporal_objective='prediction' needs"):
        ReconstructionConfig(temporal_objective="prediction", **wrong)


def test_a_block_that_it_cannot_take_says_so_and_learns_by_its_features(monkeypatch, caplog):
    monkeypatch.setattr(time_path_prediction, "is_linear", lambda node: False)
    with caplog.at_level(logging.WARNING):
        unit = rounded(calibrated(), temporal_objective=None, temporal_iterations=8)
    assert unit.iterations == 8 and "by its features" in caplog.text
    with pytest.raises(tfmq_fx.errors.ReconstructionError, match="temporal_objective='features'"):
        rounded(calibrated())


def test_one_timestep_for_a_whole_batch():
    graph = calibrated(scalar=True)
    assert rounded(graph, SCALAR_BATCHES).after > 0


def test_gptq_takes_it_by_name():
    graph = calibrated()
    config = ReconstructionConfig(method="gptq", temporal_objective="prediction")
    report = tfmq_fx.reconstruct(graph, BATCHES, config, progress=False)
    assert report.units[0].name == "temporal block"
    assert not any(unit.kind == "temporal" for unit in report.units[1:])


def test_probes_are_the_jacobian_of_the_result():
    graph = calibrated()
    model = float_graph(graph)
    assert not any(str(n.target) in quantizers_of(graph) for n in model.graph.nodes)
    block = find_temporal_block(graph)
    layers = [layer.linear for layer in block.embedding_layers]
    samples = gather_samples(graph, BATCHES, 0)
    probes = output_probes(model, layers, samples, "timestep", TIMESTEPS, 0)
    for layer in layers:
        assert probes[layer].shape[0] == len(TIMESTEPS) and probes[layer].isfinite().all()
    # A constant error of one feature moves the result by as much as its probes say.
    layer = layers[-1]
    named = {node.name: node for node in model.graph.nodes}
    bias = model.get_parameter(str(named[layer.name].args[2].target))
    error = 1e-3 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))
    sample, timestep = (torch.cat(column) for column in zip(*BATCHES, strict=True))
    with torch.no_grad():
        before = model(sample, timestep)
        bias += error
        after = model(sample, timestep)
        bias -= error
    truth = (after - before).square().flatten(1).sum(1)
    said = (probes[layer] @ error).square().sum(1)
    expected = sum(float(said[list(TIMESTEPS).index(t)]) for t in timestep)
    assert expected == pytest.approx(float(truth.sum()), rel=0.5)


def joint(channels=2, columns=3, entries=5, probes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, inputs = draw(channels, columns), draw(entries, columns)
    return JointLayer(
        weight=weight,
        scale=torch.full((channels, 1), 0.5, dtype=torch.float64),
        low=torch.full((channels, 1), -2.0, dtype=torch.float64),
        high=torch.full((channels, 1), 2.0, dtype=torch.float64),
        inputs=inputs,
        target=(inputs + 0.05 * draw(entries, columns)) @ weight.T,
        probes=draw(entries, probes, channels),
        prior=0.01 * torch.eye(columns, dtype=torch.float64),
    )


def objective(layers, shrinkage):
    """The sum of the module's formula, naively."""
    total = 0.0
    for t in range(len(layers[0].inputs)):
        g = torch.cat([layer.probes[t] for layer in layers], 1)
        e = torch.cat([layer.error()[t] for layer in layers])
        total += (1 - shrinkage) * (g @ e).square().sum() + shrinkage * (g.square().sum(0) * e.square()).sum()
    for layer in layers:
        felt = layer.probes.square().sum(1).mean(0)
        total += (felt * ((layer.moved() @ layer.prior) * layer.moved()).sum(1)).sum()
    return float(total)


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_falls_with_every_sweep_to_near_the_least(seed):
    layers = [joint(seed=seed), joint(channels=1, seed=seed + 100)]
    values = [objective(layers, 0.5)]
    for sweep in range(4):
        round_together(layers, 1, torch.Generator().manual_seed(sweep))
        values.append(objective(layers, 0.5))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    found = [layer.integers.clone() for layer in layers]
    least = float("inf")
    grids = [torch.tensor(choice, dtype=torch.float64) for choice in itertools.product(range(-2, 3), repeat=3)]
    for rows in itertools.product(grids[::1], repeat=1):
        # One channel at a time, the others where they are: no channel alone can do much better.
        for layer, kept in zip(layers, found, strict=True):
            for channel in range(len(kept)):
                layer.integers = kept.clone()
                layer.integers[channel] = rows[0]
                least = min(least, objective(layers, 0.5))
                layer.integers = kept.clone()
    assert values[-1] <= 2.0 * least
    assert all(((layer.integers >= layer.low) & (layer.integers <= layer.high)).all() for layer in layers)


def test_alone_no_channel_gets_worse():
    layer = joint(channels=8)
    before = layer.error().square().sum(0) + ((layer.moved() @ layer.prior) * layer.moved()).sum(1)
    round_alone(layer)
    after = layer.error().square().sum(0) + ((layer.moved() @ layer.prior) * layer.moved()).sum(1)
    assert (after <= before).all() and after.sum() < before.sum()


def test_timesteps_between_those_of_a_schedule():
    assert timesteps_between(torch.tensor([8.0, 0.0, 4.0])).tolist() == [1, 2, 3, 5, 6, 7]
    assert timesteps_between(torch.tensor([0.0, 1.0])).tolist() == []
    assert timesteps_between(torch.tensor([0.0, 0.5])).tolist() == [0.125, 0.25, 0.375]


def test_weights_alone_are_changed():
    graph = calibrated()
    weights = {name for name, module in quantizers_of(graph).items() if isinstance(module, AdaRoundQuantizer)}
    before = state(graph)
    rounded(graph)
    changed = {name for name, value in state(graph).items() if not torch.equal(value, before[name])}
    assert any(name.rpartition(".")[0] in weights for name in changed)
