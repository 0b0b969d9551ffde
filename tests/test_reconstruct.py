"""Reconstruction as a whole: unit by unit, no worse anywhere, resumable to the bit, in bounded memory."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tfmq_fx.passes import PartitionUnits
from tfmq_fx.passes.predicates import fqn
from torch import fx
from torch.utils import _pytree as pytree

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tests.reconstruction_cases import BATCHES, SCALAR_BATCHES, calibrated, same, state
from tfmq_fx import CalibrationError, ConfigError, QuantizationConfig, TimestepError
from tfmq_fx.errors import ReconstructionError
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, float_mode, quantizers_of
from tfmq_fx.reconstruction.progress import ReconstructionProgress
from tfmq_fx.reconstruction.propagation import Propagation
from tfmq_fx.reconstruction.samples import gather_samples
from tfmq_fx.reconstruction.temporal import observe_temporal_block
from tfmq_fx.reconstruction_config import ReconstructionConfig

SHORT = {"iterations": 8, "temporal_iterations": 8, "batch_size": 16}
#: Runs that differ in what they train and draw.
KINDS = [{}, {"temporal": "blocks"}, {"learned_steps": True, "drop_activations": 0.5, "quantized_inputs": 0.5}]


def rec(graph, batches=BATCHES, *, directory=None, cache_bytes=2**30, **options):
    config = ReconstructionConfig(**{**SHORT, **options})
    return tfmq_fx.reconstruct(graph, batches, config, directory=directory, cache_bytes=cache_bytes, progress=False)


@functools.cache
def reconstructed(**options):
    """What an uninterrupted run ends with."""
    graph = calibrated()
    rec(graph, **options)
    return state(graph)


def sentence(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interrupt_after(monkeypatch, steps):
    """Ctrl-C in the middle of training."""
    done = []

    def advance(self, iteration, loss):
        done.append(iteration)
        if len(done) > steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(ReconstructionProgress, "advance", advance)


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
    ({"precision": "bfloat16"}, [TIME | EMBED, *BLOCKS]),
    ({"held_back": 0.0}, [TIME | EMBED, *BLOCKS]),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_each_option_trains_its_weights_and_makes_nothing_worse(monkeypatch, options, expected):
    from tfmq_fx.reconstruction import training

    graph, trained = calibrated(), []

    def record(weights, *rest, **options):
        trained.append(weights)
        training.train(weights, *rest, **options)

    monkeypatch.setattr("tfmq_fx.reconstruction.unit.train", record)
    monkeypatch.setattr("tfmq_fx.reconstruction.temporal.train", record)
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
    assert steps_moved == options.get("learned_steps", False)
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
    observe_temporal_block(graph, "timestep", TIMESTEPS)
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


# --- reproducible, resumable ------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_one_seed_gives_the_same_bits_and_another_does_not(options):
    graph = calibrated(observers=True)
    torch.manual_seed(123)  # nothing outside may matter
    rec(graph, **options)
    torch.manual_seed(321)
    assert same(state(graph), reconstructed(**options))
    rec(graph, **options, seed=1)
    assert not same(state(graph), reconstructed(**options))


@pytest.mark.parametrize("options", KINDS)
def test_running_again_on_the_same_graph_starts_over(options):
    graph = calibrated()
    for _ in range(2):
        rec(graph, **options)
    assert same(state(graph), reconstructed(**options))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("options", KINDS)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, options, fresh):
    expected = reconstructed(**options)
    graph = calibrated()
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, 2 * SHORT["iterations"] + 5)
        with pytest.raises(KeyboardInterrupt):
            rec(graph, directory=tmp_path / "state", **options)
    if fresh:
        graph = calibrated()
    report = rec(graph, directory=tmp_path / "state", **options)
    assert report.resumed == 2
    assert same(state(graph), expected)


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
    report = rec(calibrated(), directory=tmp_path)
    expected = reconstructed()  # trained on its first use, which must not be below
    monkeypatch.setattr("tfmq_fx.reconstruction.unit.train", None)
    monkeypatch.setattr("tfmq_fx.reconstruction.temporal.train", None)
    graph = calibrated()
    again = rec(graph, directory=tmp_path)
    assert same(state(graph), expected)
    assert report.resumed == 0 and again.resumed == 4 and again.units == report.units
    assert again.seconds >= sum(unit.seconds for unit in report.units)


CHILD = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from tests.reconstruction_cases import calibrated
from tests.test_reconstruct import rec
rec(calibrated(observers=True), directory=sys.argv[1], iterations=60)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    folder = tmp_path / "state"
    command = [sys.executable, "-c", CHILD, str(folder), str(torch.get_num_threads())]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while len(list(folder.glob("unit-*.safetensors"))) < 2:
            assert child.poll() is None, child.stderr.read().decode()
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    finished = len(list(folder.glob("unit-*.safetensors")))
    assert 2 <= finished < 4
    graph = calibrated()
    assert rec(graph, directory=folder, iterations=60).resumed == finished
    assert same(state(graph), reconstructed(iterations=60))


def test_a_run_that_was_killed_while_it_wrote_its_plan_can_start(tmp_path):
    (tmp_path / ".plan.json.abc123").write_text('{"finger')
    assert rec(calibrated(), granularity="none", directory=tmp_path).resumed == 0
    assert rec(calibrated(), granularity="none", directory=tmp_path).resumed == 1


@pytest.mark.parametrize(
    ("other", "batches"), [({"seed": 1}, BATCHES), ({"iterations": 13}, BATCHES), ({}, BATCHES[:1])]
)
def test_the_directory_of_another_run_is_refused(tmp_path, other, batches):
    rec(calibrated(), directory=tmp_path / "state")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    with pytest.raises(ReconstructionError, match="another reconstruction") as caught:
        rec(calibrated(), batches, directory=tmp_path / "state", **other)
    assert str(tmp_path / "state") in sentence(caught)
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == kept


def test_the_directory_of_other_weights_or_another_width_is_refused(tmp_path):
    rec(calibrated(), granularity="none", directory=tmp_path)
    for other in (calibrated(model_seed=1), calibrated(weight_bits=3), calibrated(temporal="shared")):
        with pytest.raises(ReconstructionError, match="another reconstruction"):
            rec(other, granularity="none", directory=tmp_path)


def test_timesteps_of_whole_batches_are_part_of_the_run(tmp_path):
    rec(calibrated(scalar=True), SCALAR_BATCHES, directory=tmp_path)
    swapped = [(sample, TIMESTEPS[-1] - t) for sample, t in SCALAR_BATCHES]
    with pytest.raises(ReconstructionError, match="another reconstruction"):
        rec(calibrated(scalar=True), swapped, directory=tmp_path)


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ReconstructionError, match="something else") as caught:
            rec(calibrated(), directory=path)
        sentence(caught)
    with pytest.raises(ReconstructionError, match="cannot be made") as caught:
        rec(calibrated(), directory=tmp_path / "thesis.txt" / "state")
    sentence(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_unit_file_is_named(tmp_path, damage):
    rec(calibrated(), granularity="none", directory=tmp_path)
    (unit,) = tmp_path.glob("unit-*.safetensors")
    unit.write_bytes(damage(unit.read_bytes()))
    with pytest.raises(ReconstructionError, match="remove that file to train the unit again") as caught:
        rec(calibrated(), granularity="none", directory=tmp_path)
    assert str(unit) in sentence(caught)
    unit.unlink()
    assert rec(calibrated(), granularity="none", directory=tmp_path).resumed == 0


@pytest.mark.parametrize("result", [None, "nonsense", '{"name": "x", "kind": "y", "colour": 3}'])
def test_a_unit_file_of_something_else_is_named(tmp_path, result):
    from safetensors.torch import save_file

    rec(calibrated(), granularity="none", directory=tmp_path)
    (unit,) = tmp_path.glob("unit-*.safetensors")
    save_file({"x": torch.zeros(1)}, unit, None if result is None else {"result": result})
    with pytest.raises(ReconstructionError, match="remove that file") as caught:
        rec(calibrated(), granularity="none", directory=tmp_path)
    sentence(caught)


def test_a_damaged_plan_is_refused(tmp_path):
    rec(calibrated(), granularity="none", directory=tmp_path)
    for content in ("", "[]", '{"fingerprint": 3}'):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(ReconstructionError, match="remove it to start over"):
            rec(calibrated(), granularity="none", directory=tmp_path)


# --- memory and disk --------------------------------------------------------------------------------


def test_without_memory_activations_lie_in_files_that_vanish(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    roomy, tight, in_directory = calibrated(), calibrated(), calibrated()
    report = rec(roomy)
    assert report.spilled_bytes == 0 < report.peak_cache_bytes
    spilled = rec(tight, cache_bytes=0)
    assert spilled.spilled_bytes == spilled.peak_cache_bytes == report.peak_cache_bytes
    assert not list((tmp_path / "temporary").iterdir())
    rec(in_directory, cache_bytes=0, directory=tmp_path / "state")
    assert all(path.name == "plan.json" or path.name.startswith("unit-") for path in (tmp_path / "state").iterdir())
    assert same(state(tight), state(roomy)) and same(state(in_directory), state(roomy))


def test_some_memory_is_used_before_files():
    full = rec(calibrated()).peak_cache_bytes
    report = rec(calibrated(), cache_bytes=full // 2)
    assert 0 < report.spilled_bytes <= report.peak_cache_bytes - full // 4


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_for_activations_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("tfmq_fx.reconstruction.store.reserve", no_room)
    graph = calibrated()
    with pytest.raises(ReconstructionError, match="raise cache_bytes") as caught:
        rec(graph, cache_bytes=0, directory=tmp_path)
    assert "No space left" in sentence(caught) and str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob("activations-*"))
    tfmq_fx.convert(graph)


def test_a_full_disk_for_the_state_is_one_sentence_and_leaves_no_parts(tmp_path, monkeypatch):
    rec(calibrated(), granularity="none", directory=tmp_path)
    next(tmp_path.glob("unit-*")).unlink()
    monkeypatch.setattr("os.fsync", no_room)
    graph = calibrated()
    with pytest.raises(ReconstructionError, match="could not be written") as caught:
        rec(graph, granularity="none", directory=tmp_path)
    assert "No space left" in sentence(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    tfmq_fx.convert(graph)


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
    "an input is missing": ([(X,)], "has no 'timestep'"),
    "one too many": ([(X, T, T)], "3 values"),
    "unknown name": ([{"sample": X, "timestep": T, "colour": T}], "unknown 'colour'"),
    "axes": ([(X[0], T)], r"'sample' is \[1, 8, 8\]"),
    "no tensor": ([("x", T)], "'sample' is str"),
    "size of the image": ([(X[..., :4], T)], r"\[8, 1, 8, 4\]"),
    "two sizes": ([(X, T), (X[..., :4], T)], "batch 1"),
    "rows": ([(X, T[:5])], r"'timestep' has shape \[5\]"),
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
    with pytest.raises(ReconstructionError, match="NaN or infinite") as caught:
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
        if isinstance(q, AdaRoundQuantizer) and not torch.equal(q.up, q.ratio().round() > q.ratio().floor())
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
