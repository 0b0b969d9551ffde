"""Reconstruction as a whole: unit by unit, and no worse anywhere."""

import json

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tests.reconstruction_cases import (
    BATCHES,
    SCALAR_BATCHES,
    SHORT,
    calibrated,
    interrupt_after,
    rec,
    reconstructed,
    same,
    sentence,
    state,
)
from tfmq_fx import CalibrationError, ConfigError, NonFiniteError, QuantizationConfig, TimestepError
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, float_mode, quantizers_of
from tfmq_fx.passes import PartitionUnits
from tfmq_fx.passes.support.predicates import fqn
from tfmq_fx.reconstruction.propagation import Propagation
from tfmq_fx.reconstruction.samples import gather_samples
from tfmq_fx.reconstruction.time_path import temporal_unit
from tfmq_fx.temporal.domain import finite_domain

# --- what it is for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_every_unit_and_the_whole_network_come_closer_to_float(bits):
    inputs = batch(64, seed=11)
    graph = calibrated(weight_bits=bits)
    with torch.no_grad():
        wanted, nearest = small_denoiser()(*inputs), graph(*inputs)
        # Gradients that are switched off outside are on in training.
        report = rec(graph, iterations=50, temporal_iterations=50)
        learned = graph(*inputs)
    trained = [unit for unit in report.units if unit.iterations]
    assert [unit.name for unit in trained] == ["temporal block", "down", "qkv", "up"]
    assert all(unit.after <= unit.before and 0 <= unit.changed < 0.5 for unit in trained)
    assert sum(unit.after < 0.95 * unit.before for unit in trained) >= 3
    assert relative(learned, wanted) < 0.9 * relative(nearest, wanted)
    assert "4 of 6 units reconstructed" in str(report)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what its units give."""

    def run_node(self, n):
        value = super().run_node(n)
        if "tfmq_fx.unit" in n.meta:
            self.found[n.meta["tfmq_fx.unit"][0]] = pytree.tree_leaves(value)
        return value

    def record(self, *inputs):
        self.found = {}
        with torch.no_grad():
            self.run(*inputs)
        return self.found


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_the_reported_errors_are_those_of_the_units_on_rows_that_no_training_saw(granularity):
    """Found again by running the whole quantized and the whole float model on those rows."""
    graph = calibrated()
    report = rec(graph, granularity=granularity)
    samples = gather_samples(graph, BATCHES, seed=0)
    rows, back = samples.split(0.125)
    assert (rows, back) == (42, 6)
    inputs = [column[rows:] for column in samples.inputs]
    PartitionUnits(granularity=granularity)(graph)
    recorder = Recorder(graph)
    quantized = recorder.record(*inputs)
    with float_mode(quantizers_of(graph).values()):
        original = recorder.record(*inputs)
    units = [unit for unit in report.units if unit.iterations and unit.kind != "temporal"]
    assert len(units) == (3 if granularity == "block" else 7)
    for unit in units:
        error = 0.0
        for ours, theirs in zip(quantized[unit.name], original[unit.name], strict=True):
            channels = 2 if unit.name == "qkv" and ours.ndim == 3 else 1
            error += float((ours - theirs).square().sum()) * ours.shape[channels] / ours.numel()
        assert unit.after == pytest.approx(error, rel=1e-3)


def layer_names(graph):
    """The layer of every quantized weight, by the identity of its quantizer."""
    modules = quantizers_of(graph)
    return {
        id(modules[str(node.target)]): fqn(next(iter(node.users)))
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules.get(str(node.target)), AdaRoundQuantizer)
    }


TIME, EMBED = {"time.one", "time.two"}, {"down.embed", "up.embed"}
BLOCKS = [{"down.conv1", "down.conv2"}, {"qkv"}, {"up.conv1", "up.conv2", "up.shortcut"}]
LAYERS = [{name} for name in ("down.conv1", "down.conv2", "qkv", "up.conv1", "up.shortcut", "up.conv2")]
WITH_EMBED = [{"time.one"}, {"time.two"}, BLOCKS[0] | {"down.embed"}, BLOCKS[1], BLOCKS[2] | {"up.embed"}]
OPTIONS = [
    ({}, [TIME | EMBED, *BLOCKS]),
    ({"granularity": "none"}, [TIME | EMBED]),
    ({"granularity": "layer"}, [TIME | EMBED, *LAYERS]),
    ({"temporal": "blocks"}, WITH_EMBED),
    ({"temporal": "nearest"}, BLOCKS),
    (
        {"granularity": "layer", "temporal": "blocks"},
        [{"time.one"}, {"time.two"}, {"down.embed"}, {"up.embed"}, *LAYERS],
    ),
    ({"quantized_inputs": 0.5}, [TIME | EMBED, *BLOCKS]),
    ({"drop_activations": 0.5}, [TIME | EMBED, *BLOCKS]),
    ({"fisher": True}, [TIME | EMBED, *BLOCKS]),
    ({"learned_steps": True}, [TIME | EMBED, *BLOCKS]),
    ({"learned_steps": True, "temporal": "blocks"}, WITH_EMBED),
    ({"learned_steps": "after", "step_share": 2.0}, [TIME | EMBED, *BLOCKS]),
    ({"learned_steps": "after", "step_share": 2.0, "temporal": "blocks"}, WITH_EMBED),
    ({"precision": "bfloat16"}, [TIME | EMBED, *BLOCKS]),
    ({"held_back": 0.0}, [TIME | EMBED, *BLOCKS]),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_each_option_trains_its_weights_and_makes_nothing_worse(monkeypatch, options, expected):
    from tfmq_fx.reconstruction import training

    # Steps that are learned behind the weights are kept only where the held-back error falls: of one range it does.
    groups = 1 if options.get("learned_steps") == "after" else None
    graph, trained = calibrated(activation_groups=groups), []

    def record(weights, *rest, **options):
        trained.append(weights)
        training.train(weights, *rest, **options)

    monkeypatch.setattr("tfmq_fx.reconstruction.unit.train", record)
    monkeypatch.setattr("tfmq_fx.reconstruction.domain_training.train", record)
    names, before = layer_names(graph), state(graph)
    report = rec(graph, **options)
    found = [{names[id(quantizer)] for quantizer in weights} for weights in trained]
    assert sorted(map(sorted, found)) == sorted(map(sorted, _parts(found, expected)))
    units = [unit for unit in report.units if unit.iterations]
    assert len(units) == len(trained)
    assert all(0 <= unit.after <= unit.before < 1 for unit in units)
    assert any(unit.changed > 0 for unit in units)
    after = state(graph)
    steps_moved = any(not torch.equal(after[n], before[n]) for n in after if n.endswith(".scale"))
    assert steps_moved == bool(options.get("learned_steps"))
    with torch.no_grad():
        assert torch.equal(graph(*batch()), tfmq_fx.convert(graph)(*batch()))


def _parts(found, expected):
    """A conv over a concatenation is two layers of one name."""
    doubled = [names for names in expected if names in ({"up.shortcut"}, {"up.conv1"})]
    return [*expected, *(names for names in doubled if found.count(names) == 2)]


@pytest.mark.parametrize(("share", "expected"), [(1.0, {True}), (0.5, {True, False})])
def test_inputs_come_from_the_quantized_units_before_unless_mixed(monkeypatch, share, expected):
    asked, genuine = set(), Propagation.arguments

    def arguments(self, node, window, *, quantized):
        if "tfmq_fx.unit" in node.meta and len(window) == 7:  # a mini-batch
            asked.add(quantized)
        return genuine(self, node, window, quantized=quantized)

    monkeypatch.setattr(Propagation, "arguments", arguments)
    rec(calibrated(), temporal="nearest", quantized_inputs=share, batch_size=7)
    assert asked == expected


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_the_ranges_of_the_time_embed_follow_weights_that_learn_in_blocks(temporal):
    graph = calibrated(temporal=temporal)
    before = state(graph)
    rec(graph, temporal="blocks", iterations=30)
    after = state(graph)
    temporal_unit(graph, finite_domain("timestep", {"timestep": TIMESTEPS})).observe(graph)
    assert not same(after, before) and same(state(graph), after)


def test_fisher_weights_change_the_outcome():
    assert not same(reconstructed(fisher=True), reconstructed())


def test_the_configuration_is_remembered_and_used_when_none_is_given():
    config = ReconstructionConfig(**SHORT, temporal="nearest")
    graph = calibrated()
    rec(graph, temporal="nearest")
    assert tfmq_fx.convert(graph).config.reconstruction == config
    again = calibrated(reconstruction=config)
    tfmq_fx.reconstruct(again, BATCHES, progress=False)
    assert same(state(again), state(graph))


def test_a_layer_that_stays_float_is_listed_with_its_reason():
    report = rec(calibrated())
    reasons = {unit.name: unit.reason for unit in report.units if not unit.iterations}
    assert reasons == dict.fromkeys(("enter", "leave"), "its weights are not quantized")


def test_the_report_is_plain_json():
    report = rec(calibrated(), granularity="none")
    assert json.loads(json.dumps(report.to_dict()))["units"][0]["name"] == "temporal block"
    assert "temporal block [temporal]" in str(report) and "roundings changed" in str(report)


# --- data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporal", ["tiar", "blocks"])
def test_batches_with_one_timestep_each_do_not_mix(temporal):
    graph = calibrated(scalar=True)
    report = rec(graph, SCALAR_BATCHES, temporal=temporal, iterations=30, fisher=temporal == "tiar")
    trained = [unit for unit in report.units if unit.iterations]
    assert all(0 <= unit.after <= unit.before for unit in trained)
    assert sum(unit.after < unit.before for unit in trained) >= 3
    with torch.no_grad():
        sample, t = SCALAR_BATCHES[3]
        assert torch.equal(graph(sample, t), tfmq_fx.convert(graph)(sample, t))


def test_a_single_row_is_enough():
    report = rec(calibrated(), [batch(1)])
    assert all(unit.after <= unit.before for unit in report.units)


def test_batches_may_be_mappings_and_come_from_a_generator():
    graph = calibrated()
    rec(graph, ({"timestep": t, "sample": x} for x, t in BATCHES))
    assert same(state(graph), reconstructed())


X, T = batch(8)
WRONG = {
    "none": ([], "got no batches"),
    "an input is missing": ([(X,)], "'timestep' is missing"),
    "one too many": ([(X, T, T)], "takes 2 arguments"),
    "unknown name": ([{"sample": X, "timestep": T, "colour": T}], "'colour' was not captured"),
    "axes": ([(X[0], T)], r"'sample' is \[1, 8, 8\]"),
    "no tensor": ([("x", T)], "'sample' is 'x'"),
    "size of the image": ([(X[..., :4], T)], r"\[8, 1, 8, 4\]"),
    "two sizes": ([(X, T), (X[..., :4], T)], "batch 1"),
    "rows": ([(X, T[:5])], r"'timestep' is \[5\]"),
    "dtype": ([(X.double(), T)], "float64"),
    "NaN": ([(X, T), (X * float("nan"), T)], "batch 1.* NaN"),
}


@pytest.mark.parametrize(("batches", "words"), WRONG.values(), ids=WRONG.keys())
def test_batches_that_do_not_fit_are_one_clear_sentence(batches, words):
    graph = calibrated()
    with pytest.raises(CalibrationError, match=words) as caught:
        rec(graph, batches)
    sentence(caught)
    tfmq_fx.convert(graph)


def test_an_unknown_timestep_is_named():
    with pytest.raises(TimestepError, match="not in the table"):
        rec(calibrated(), [(X, T + 1)])


def test_values_beyond_float_are_an_error_and_the_weights_stay_nearest():
    graph = calibrated()
    before = state(graph)
    with pytest.raises(
        NonFiniteError, match=r"the output of unit .down. holds NaN or infinite values in calibration batch 0"
    ) as caught:
        rec(graph, [(X * 1e30, T)], temporal="nearest", learned_steps=True)
    sentence(caught)
    after = state(graph)
    assert all(torch.equal(after[name], before[name]) for name in after if name.endswith((".up", ".scale")))
    tfmq_fx.convert(graph)


def test_the_graph_must_be_prepared_and_calibrated():
    captured = tfmq_fx.capture(small_denoiser(), batch())
    with pytest.raises(ConfigError, match=r"tfmq_fx\.prepare"):
        rec(captured)
    prepared = tfmq_fx.prepare(captured, timesteps=TIMESTEPS)
    with pytest.raises(CalibrationError, match="never observed"):
        rec(prepared)


# --- what it leaves behind --------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_training_leaves_parameters_and_random_numbers_as_they_were(monkeypatch, fails):
    graph = calibrated()
    next(graph.parameters()).requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in graph.named_parameters()}
    random = torch.get_rng_state()
    if fails:
        interrupt_after(monkeypatch, SHORT["temporal_iterations"] + 5)
        with pytest.raises(KeyboardInterrupt):
            rec(graph, drop_activations=0.5, learned_steps=True)
    else:
        rec(graph, drop_activations=0.5, learned_steps=True)
    assert torch.equal(torch.get_rng_state(), random)
    parameters = dict(graph.named_parameters())
    assert parameters.keys() == before.keys()
    for name, parameter in parameters.items():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    for quantizer in quantizers_of(graph).values():
        assert quantizer.enabled
        if isinstance(quantizer, AdaRoundQuantizer):
            assert quantizer.soft is None
        else:
            assert not quantizer.observing and quantizer.drop == 0.0 and quantizer.log_step is None


def test_a_graph_whose_training_was_interrupted_still_converts(monkeypatch):
    graph = calibrated()
    interrupt_after(monkeypatch, 2 * SHORT["iterations"] + 3)  # temporal block and "down" are done, "qkv" is not
    with pytest.raises(KeyboardInterrupt):
        rec(graph)
    names = layer_names(graph)
    changed = {
        names[id(q)]
        for q in quantizers_of(graph).values()
        if isinstance(q, AdaRoundQuantizer) and not torch.equal(q.up, q.ratio().round() - q.ratio().floor())
    }
    assert changed and changed <= TIME | EMBED | BLOCKS[0]
    program = tfmq_fx.convert(graph)
    assert program.config.reconstruction is None
    with torch.no_grad():
        assert torch.equal(program(*batch()), graph(*batch()))


# --- to the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporal", ["fsc", "shared"])
def test_the_lowered_program_is_the_fake_quantized_graph(temporal):
    graph, inputs = calibrated(temporal=temporal), batch(6, seed=7)
    rec(graph)
    denoiser = tfmq_fx.lower(tfmq_fx.convert(graph), "reference")
    with torch.no_grad():
        assert relative(denoiser(*inputs), graph(*inputs)) < 1e-5


def test_quantize_saves_what_it_has_reconstructed(tmp_path):
    reconstruction = ReconstructionConfig(**SHORT)
    config = QuantizationConfig(weight_bits=4, reconstruction=reconstruction)
    program = tfmq_fx.quantize(
        small_denoiser(), config, BATCHES, timesteps=TIMESTEPS, directory=tmp_path / "state", progress=False
    )
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "artefact"))
    assert loaded.config == config and loaded.config.reconstruction == reconstruction
    assert len(list((tmp_path / "state").glob("unit-*"))) == 4
    graph = calibrated()
    rec(graph)
    with torch.no_grad():
        assert torch.equal(loaded(*batch()), graph(*batch()))
