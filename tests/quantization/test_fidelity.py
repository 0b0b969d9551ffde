"""What quantizing lost: the items that calibration keeps, what conversion measures on them, warnings and refusals."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import tfmq_fx
from tests.models import TIMESTEPS, ClassDenoiser, PromptDenoiser, batch, relative, small_denoiser
from tfmq_fx import ConfigError, Fidelity, FidelityError, QuantizationConfig, TFMQQuantizer
from tfmq_fx.quantization import probes as probes_module
from tfmq_fx.quantization.fidelity import TimestepFidelity
from tfmq_fx.quantization.probes import MOST_PROBES, probes_of

BATCHES = [batch(8, seed) for seed in range(4)]
COARSE = QuantizationConfig(weight_bits=2, activation_bits=3, shortcut_bits=None)


def prepared(config=None, model=None, timesteps=TIMESTEPS):
    captured = tfmq_fx.capture(model or small_denoiser(), BATCHES[0])
    return tfmq_fx.prepare(captured, config or QuantizationConfig(), timesteps=timesteps)


def calibrated(*arguments, batches=BATCHES, **options):
    graph = prepared(*arguments, **options)
    tfmq_fx.calibrate(graph, batches, progress=False)
    return graph


def quiet(graph, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tfmq_fx.convert(graph, **options)


class Pair(nn.Module):
    """Two inputs, one of them by name alone, no timestep; three results, one of integers."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x, *, scale):
        hidden = self.enter(x) * scale
        return {"out": self.leave(hidden.relu()), "hidden": hidden, "index": hidden.argmax(-1)}


def pairs(count, size=4):
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(size, 6, generator=generator), "scale": torch.rand(size, 1, generator=generator)}
        for _ in range(count)
    ]


# --- what calibration keeps -------------------------------------------------------------------------


def test_a_calibrated_graph_has_items_with_the_float_results_for_them():
    model = small_denoiser()
    kept = probes_of(calibrated(model=model))
    assert len(kept) == len({probe.timestep for probe in kept}) == MOST_PROBES
    for probe in kept:
        (sample, timestep), _ = probe.call.arguments()
        assert len(sample) == 1 and timestep.tolist() == [probe.timestep]
        assert any(bool((sample == image).all()) for images, _ in BATCHES for image in images)
        with torch.no_grad():
            assert relative(probe.expected[0], model(sample, timestep)) < 1e-5


def test_a_prepared_graph_computes_in_float_while_it_is_calibrated():
    model, graph = small_denoiser(), prepared()
    with torch.no_grad():
        assert relative(graph(*BATCHES[0]), model(*BATCHES[0])) < 1e-5


def test_ranges_are_those_of_before(monkeypatch):
    with_probes = calibrated().state_dict()
    monkeypatch.setattr(probes_module, "MOST_PROBES", 0)
    graph = calibrated()
    assert not probes_of(graph)
    assert all(torch.equal(value, with_probes[name]) for name, value in graph.state_dict().items())
    assert tfmq_fx.convert(graph).fidelity is None


def test_items_are_copies_that_their_owner_may_change():
    batches = [(x.clone(), t.clone()) for x, t in BATCHES]
    graph = calibrated(batches=batches)
    for x, _ in batches:
        x.fill_(1e9)
    assert all(float(probe.call.leaves[0].abs().max()) < 10 for probe in probes_of(graph))


def test_they_are_few_small_and_spread_over_the_timesteps():
    steps = torch.arange(0, 1000, 10)
    batches = [(torch.randn(2, 1, 8, 8), step.repeat(2)) for step in steps.flip(0)]
    kept = sorted(probe.timestep for probe in probes_of(calibrated(timesteps=steps, batches=batches)))
    assert len(kept) == MOST_PROBES and (kept[0], kept[-1]) == (0, 990)
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps) <= 250


@pytest.mark.parametrize(("most", "count"), [(0, 0), (300, 0), (1300, 2), (10**6, MOST_PROBES)])
def test_their_bytes_are_bounded(monkeypatch, most, count):
    """An item of an image, a timestep and a result takes 520 bytes."""
    monkeypatch.setattr(probes_module, "MOST_BYTES", most)
    graph = calibrated()
    assert len(probes_of(graph)) == count
    assert (tfmq_fx.convert(graph).fidelity is None) == (count == 0)


def test_calibrating_again_goes_on():
    graph = prepared()
    first, second = BATCHES[0], BATCHES[1]
    tfmq_fx.calibrate(graph, [first], progress=False)
    before = probes_of(graph)
    tfmq_fx.calibrate(graph, [second], progress=False)
    assert {probe.timestep for probe in probes_of(graph)} == {*first[1].tolist(), *second[1].tolist()}
    assert all(any(old.call is new.call for new in probes_of(graph)) for old in before)


def test_timesteps_and_labels_outside_the_tables_are_not_kept():
    x, t = BATCHES[0]
    kept = probes_of(calibrated(QuantizationConfig(temporal="float"), batches=[(x, t), (x, t + 1)]))
    assert {probe.timestep for probe in kept} == set(t.tolist())
    torch.manual_seed(0)
    labels = torch.arange(8) % 4
    captured = tfmq_fx.capture(ClassDenoiser().eval(), (x, t, labels))
    graph = tfmq_fx.prepare(
        captured,
        QuantizationConfig(temporal="cache", activation_groups=1),
        timesteps=TIMESTEPS,
        finite={"class_labels": [0, 1]},
    )
    tfmq_fx.calibrate(graph, [(x, t, labels)], progress=False)
    assert {int(probe.call.leaves[2]) for probe in probes_of(graph)} <= {0, 1}
    assert tfmq_fx.convert(graph).fidelity.error < 0.1


def test_a_calibration_that_fails_leaves_none():
    graph = prepared()
    with pytest.raises(tfmq_fx.CalibrationError):
        tfmq_fx.calibrate(graph, [BATCHES[0], (torch.full((2, 1, 8, 8), math.nan), TIMESTEPS[:2])], progress=False)
    assert not probes_of(graph)


# --- what conversion measures -----------------------------------------------------------------------


@pytest.mark.parametrize("temporal", ["fsc", "shared", "observed", "float", "cache", "auto"])
def test_a_program_knows_how_far_it_is_from_the_float_model(temporal):
    model, graph = small_denoiser(), calibrated(QuantizationConfig(temporal=temporal))
    program = tfmq_fx.convert(graph)
    for entry in program.fidelity.timesteps:
        (probe,) = [probe for probe in probes_of(graph) if probe.timestep == entry.timestep]
        args, _ = probe.call.arguments()
        with torch.no_grad():
            exact, actual = model(*args), program(*args)
        assert entry.error == pytest.approx(relative(actual, exact), rel=1e-3)
        mean = float((actual - exact).square().mean())
        assert entry.psnr == pytest.approx(10 * math.log10(float(exact.abs().max()) ** 2 / mean), abs=0.01)
    assert 0 < program.fidelity.error <= program.fidelity.worst.error < 0.1
    assert not probes_of(program.graph_module) and probes_of(graph)
    assert "relative error" in repr(program) and "PSNR" in str(program.fidelity)


def test_copies_of_a_graph_measure_the_same():
    graph = calibrated()
    wanted = tfmq_fx.convert(graph).fidelity
    assert tfmq_fx.convert(copy.deepcopy(graph)).fidelity == wanted == tfmq_fx.convert(graph).fidelity
    assert copy.deepcopy(tfmq_fx.convert(graph)).fidelity == wanted
    assert tfmq_fx.quantize(small_denoiser(), None, BATCHES, timesteps=TIMESTEPS).fidelity == wanted


def test_a_model_without_a_timestep_that_takes_and_returns_several_tensors():
    torch.manual_seed(0)
    model, batches = Pair().eval(), pairs(30, size=32)
    captured = tfmq_fx.capture(model, (batches[0]["x"],), example_kwargs={"scale": batches[0]["scale"]})
    graph = prepare_pt2e(captured, TFMQQuantizer(QuantizationConfig(keep_float=())))
    tfmq_fx.calibrate(graph, batches, progress=False)
    assert len(probes_of(graph)) == MOST_PROBES
    assert all(len(probe.expected) == 2 for probe in probes_of(graph))
    (entry,) = tfmq_fx.convert(graph).fidelity.timesteps
    assert entry.timestep is None and 0 < entry.error < 0.2
    assert entry.numbers == MOST_PROBES * (5 + 8)


def test_stock_conversion_measures_where_calibrate_kept_items_and_nowhere_else():
    graph = calibrated()
    wanted = tfmq_fx.convert(graph).fidelity
    assert tfmq_fx.program_from_graph(convert_pt2e(copy.deepcopy(graph))).fidelity == wanted
    assert tfmq_fx.lower(convert_pt2e(copy.deepcopy(graph)), "reference").report.fidelity == wanted
    torch.manual_seed(0)
    model, (inputs,) = Pair().eval(), pairs(1)
    captured = tfmq_fx.capture(model, (inputs["x"],), example_kwargs={"scale": inputs["scale"]})
    called = prepare_pt2e(captured, TFMQQuantizer())
    called(**inputs)
    program = tfmq_fx.convert(called)
    assert program.fidelity is None and "relative error" not in repr(program)
    with pytest.raises(ConfigError, match=r"max_error=0\.1 cannot be checked"):
        tfmq_fx.convert(called, max_error=0.1)


def test_a_fixed_batch_of_several_timesteps_is_measured_whole():
    captured = tfmq_fx.capture(small_denoiser(), BATCHES[0], batched=())
    graph = tfmq_fx.prepare(captured, None, timesteps=TIMESTEPS)
    tfmq_fx.calibrate(graph, BATCHES, progress=False)
    assert all(len(probe.expected[0]) == 8 for probe in probes_of(graph))
    (entry,) = tfmq_fx.convert(graph).fidelity.timesteps
    assert entry.timestep is None and entry.numbers == len(BATCHES) * 8 * 64


def test_prompts_and_reconstruction():
    torch.manual_seed(0)
    x, t = BATCHES[0]
    inputs = (x, t, torch.randn(8, 3, 12), torch.randn(8, 6))
    graph = tfmq_fx.prepare(
        tfmq_fx.capture(PromptDenoiser().eval(), inputs), QuantizationConfig(weight_bits=3), timesteps=TIMESTEPS
    )
    tfmq_fx.calibrate(graph, [inputs], progress=False)
    before = quiet(copy.deepcopy(graph)).fidelity
    tfmq_fx.reconstruct(graph, [inputs], {"iterations": 60, "temporal_iterations": 20}, progress=False)
    after = quiet(graph).fidelity
    assert [entry.signal for entry in after.timesteps] == [entry.signal for entry in before.timesteps]
    assert after != before and after.error < 1.2 * before.error


# --- warnings and refusals --------------------------------------------------------------------------


def test_a_program_that_is_far_off_is_warned_of_with_the_layers():
    graph = calibrated(COARSE)
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    with pytest.warns(UserWarning, match="parts from the float model by a relative error of") as caught:
        program = tfmq_fx.convert(graph)
    (warning,) = [entry for entry in caught if "parts from the float" in str(entry.message)]
    worst = program.fidelity.worst
    assert worst.error > 0.7 and f"{worst.error:.2g} at timestep {worst.timestep:g};" in str(warning.message)
    layers = str(warning.message).split("furthest off are ")[1].split("; ")[0]
    assert layers.count("'") == 6 and not any(name in layers for name in program.kept_float)
    assert warning.filename == __file__
    assert all(torch.equal(value, state[name]) for name, value in graph.state_dict().items())


def test_one_that_is_near_is_not(recwarn):
    tfmq_fx.convert(calibrated())
    assert not [entry for entry in recwarn if "parts from the float" in str(entry.message)]


def test_max_error_refuses_or_takes_the_place_of_the_warning():
    graph = calibrated(COARSE)
    with pytest.raises(
        FidelityError, match=r"relative error of .* at timestep \d+, more than max_error=0.1; .*'.*'.*'"
    ):
        tfmq_fx.convert(graph, max_error=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tfmq_fx.convert(graph, max_error=100)
    with pytest.raises(FidelityError):
        tfmq_fx.quantize(small_denoiser(), None, BATCHES, timesteps=TIMESTEPS, max_error=1e-3, progress=False)
    assert tfmq_fx.quantize(small_denoiser(), None, BATCHES, timesteps=TIMESTEPS, max_error=0.1).fidelity.error < 0.1


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "0.1", True])
def test_max_error_is_a_number(value):
    with pytest.raises(ConfigError, match="max_error="):
        tfmq_fx.convert(prepared(), max_error=value)
    with pytest.raises(ConfigError, match="max_error="):
        tfmq_fx.quantize(small_denoiser(), None, BATCHES, timesteps=TIMESTEPS, max_error=value)


# --- the numbers ------------------------------------------------------------------------------------


def test_ratios_at_their_ends():
    zeros, ones, broken = torch.zeros(4), torch.ones(4), torch.full((4,), math.nan)
    same = TimestepFidelity.of(3.0, [ones], [ones])
    assert (same.error, same.psnr) == (0.0, math.inf)
    assert TimestepFidelity.of(3.0, [zeros], [zeros]).error == 0.0
    invented = TimestepFidelity.of(3.0, [ones], [zeros])
    assert (invented.error, invented.psnr) == (math.inf, -math.inf)
    lost = TimestepFidelity.of(3.0, [zeros], [ones])
    assert (lost.error, lost.psnr) == (1.0, 0.0)
    assert TimestepFidelity.of(3.0, [broken], [ones]).error == math.inf
    both = Fidelity.of([same, lost, TimestepFidelity.of(5.0, [ones], [ones])])
    assert [entry.timestep for entry in both.timesteps] == [5.0, 3.0]
    assert both.worst.timestep == 3.0 and both.worst.error == pytest.approx(math.sqrt(0.5))
    assert both.error == pytest.approx(math.sqrt(1 / 3))
    for fidelity in (both, Fidelity.of([invented]), Fidelity.of([TimestepFidelity.of(None, [broken], [ones])])):
        assert Fidelity.from_dict(fidelity.to_dict()) == fidelity
        assert str(fidelity)
    assert Fidelity.of([]) is None
