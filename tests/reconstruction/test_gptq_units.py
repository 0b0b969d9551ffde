"""GPTQ over a model: one entry per layer, resumable, what convert gets, and the default of narrow weights."""

import pytest
import torch

import tfmq_fx
from tests.models import TIMESTEPS, batch, relative, small_denoiser
from tests.reconstruction_cases import BATCHES, SCALAR_BATCHES, calibrated, interrupt_after, same, state
from tfmq_fx import QuantizationConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer, quantizers_of


def gptq(graph, batches=BATCHES, **options):
    folder = options.pop("directory", None)
    return tfmq_fx.reconstruct(graph, batches, {"method": "gptq", **options}, directory=folder, progress=False)


def rounded_to_nearest(graph):
    weights = {name: q for name, q in quantizers_of(graph).items() if isinstance(q, AdaRoundQuantizer)}
    return {name for name, q in weights.items() if torch.equal(q.up, q.ratio().round() - q.ratio().floor())}


@pytest.mark.parametrize("scalar", [False, True])
def test_every_layer_has_an_entry_and_none_is_worse(scalar):
    graph = calibrated(scalar=scalar)
    report = gptq(graph, SCALAR_BATCHES if scalar else BATCHES)
    rounded = [unit for unit in report.units if unit.weights]
    weights = [q for q in quantizers_of(graph).values() if isinstance(q, AdaRoundQuantizer)]
    assert len(rounded) == len(weights) and all(unit.iterations == 1 for unit in rounded)
    assert [unit.kind for unit in rounded[:4]] == ["temporal"] * 4
    assert all(unit.after <= unit.before for unit in rounded)
    assert sum(unit.after < 0.8 * unit.before for unit in rounded) > len(rounded) / 2
    kept = [unit for unit in rounded if unit.reason]
    assert len(rounded_to_nearest(graph)) == len(kept)
    assert f"{len(rounded)} of {len(report.units)} units reconstructed" in str(report)


def test_the_model_is_closer_and_convert_gives_the_same_numbers():
    errors, data = [], batch(32, seed=9)
    for method in ("nearest", "gptq"):
        graph = calibrated()
        if method == "gptq":
            gptq(graph)
        program = tfmq_fx.convert(graph)
        with torch.no_grad():
            result = program.graph_module(*data)
            assert torch.allclose(result, graph(*data), atol=1e-5)
            errors.append(relative(result, small_denoiser()(*data)))
    assert errors[1] < 0.8 * errors[0]


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole, parts = calibrated(), calibrated()
    expected = gptq(whole)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            gptq(parts, directory=tmp_path)
    parts = calibrated()
    report = gptq(parts, directory=tmp_path)
    assert report.resumed == 5
    assert same(state(whole), state(parts))
    assert [(u.name, u.before, u.after) for u in report.units] == [(u.name, u.before, u.after) for u in expected.units]


def test_the_temporal_block_alone_takes_no_batches():
    graph = calibrated()
    before = state(graph)
    report = gptq(graph, (), granularity="none")
    assert {unit.kind for unit in report.units} == {"temporal"} and len(report.units) == 4
    changed = {name for name, value in state(graph).items() if not torch.equal(value, before[name])}
    assert sum(name.endswith(".up") for name in changed) == 4


@pytest.mark.parametrize(("temporal", "entries"), [("blocks", 4), ("nearest", 0)])
def test_the_temporal_block_goes_as_configured(temporal, entries):
    graph = calibrated()
    report = gptq(graph, temporal=temporal)
    assert [unit.reason for unit in report.units if unit.kind == "temporal"] == [
        "temporal='nearest'" for _ in range(not entries)
    ]
    names = {"time.one", "time.two", "down.embed", "up.embed"}
    assert sum(unit.name in names for unit in report.units if unit.weights) == entries


def test_narrow_weights_are_rounded_by_gptq_by_default(tmp_path):
    model, data = small_denoiser(), batch(48, seed=1)

    def quantized(**fields):
        return tfmq_fx.quantize(model, QuantizationConfig(**fields), [data], timesteps=TIMESTEPS, progress=False)

    default = quantized(weight_bits=4)
    assert default.config.reconstruction == tfmq_fx.ReconstructionConfig.of("gptq")
    assert tfmq_fx.load(tfmq_fx.save(default, tmp_path / "artefact")).config == default.config
    nearest = quantized(weight_bits=4, reconstruction="nearest")
    assert nearest.config.reconstruction.method == "nearest"
    assert quantized().config.reconstruction is None
    with torch.no_grad():
        ours, theirs = (relative(program.graph_module(*data), model(*data)) for program in (default, nearest))
    assert ours < 0.95 * theirs


def test_stage_by_stage_weights_are_rounded_to_nearest():
    data = batch(24)
    prepared = tfmq_fx.prepare(
        tfmq_fx.capture(small_denoiser(), data), QuantizationConfig(weight_bits=4), timesteps=TIMESTEPS
    )
    tfmq_fx.calibrate(prepared, [data], progress=False)
    nearest = QuantizationConfig(weight_bits=4, reconstruction="nearest")
    program = tfmq_fx.quantize(small_denoiser(), nearest, [data], timesteps=TIMESTEPS, progress=False)
    with torch.no_grad():
        assert torch.equal(tfmq_fx.convert(prepared).graph_module(*data), program.graph_module(*data))
