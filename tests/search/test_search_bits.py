"""The whole search on a small model: what it finds, what it predicts, and what it refuses."""

import json
from itertools import pairwise

import pytest

import tfmq_fx
from tests.models import TIMESTEPS
from tests.search.conftest import batches
from tfmq_fx import CalibrationError, ConfigError, QuantizationConfig
from tfmq_fx.search import search_bits as module
from tfmq_fx.search.latency import LayerTimes
from tfmq_fx.search.plots import frontier_plot
from tfmq_fx.search.widths import Widths


def searched(calibrated, budget, **options):
    return tfmq_fx.search_bits(calibrated.program, budget, batches(), timesteps=TIMESTEPS, progress=False, **options)


@pytest.fixture(scope="module")
def by_size(calibrated):
    return searched(calibrated, "size=2.1x", config=QuantizationConfig(overrides={"up.embed": {"weight_bits": 6}}))


def test_the_error_is_least_within_the_size(by_size):
    tradeoff, chosen = by_size.tradeoff, by_size.choice
    assert chosen.size <= 2.1 * tradeoff.float_size
    assert len(set(by_size.counts())) >= 2
    assert by_size.uniform["w4a8"].fidelity.error > chosen.fidelity.error
    # No single layer can have better widths without leaving the budget.
    for place, layer in enumerate(tradeoff.layers):
        for option in range(len(layer.options)):
            other = tradeoff.evaluate([*chosen.options[:place], option, *chosen.options[place + 1 :]])
            weighted = sum(float(o[i]) for o, i in zip(tradeoff._objective(), other.options, strict=True))
            best = sum(float(o[i]) for o, i in zip(tradeoff._objective(), chosen.options, strict=True))
            assert other.size > 2.1 * tradeoff.float_size or weighted >= best * (1 - 1e-5)


def test_the_widths_are_overrides_behind_those_that_were_there(by_size):
    assert next(iter(by_size.config.overrides)) == "up.embed"
    assert by_size.config.overrides["up.embed"] == {"weight_bits": 6}
    for layer, option in zip(by_size.tradeoff.layers, by_size.choice.options, strict=True):
        config = by_size.config.for_layer(layer.name)
        widths = Widths(config.weight_bits, config.activation_bits)
        assert widths == layer.options[option] or (not layer.weights and widths.activation_bits == 8)
    assert QuantizationConfig.from_dict(by_size.config.to_dict()) == by_size.config
    assert by_size.program.config.overrides == by_size.config.overrides


def test_what_is_predicted_is_about_what_is_measured(by_size):
    """Errors do not quite add up, and few layers have few bits here; more than 1.5 dB apart would be a mistake."""
    assert abs(by_size.measured.fidelity.psnr - by_size.choice.fidelity.psnr) < 1.5
    uniform = by_size.uniform["w8a8"]
    assert abs(by_size.base.fidelity.psnr - uniform.fidelity.psnr) < 1.5
    assert by_size.base.size == uniform.size
    assert by_size.measured.size <= by_size.choice.size  # float layers also leave the graph and the manifest smaller


def test_the_frontier_is_monotonic_in_the_objective(by_size):
    sizes = [choice.size for choice in by_size.frontier]
    assert sizes == sorted(sizes) and len(sizes) > 5
    objective = by_size.tradeoff._objective()
    errors = [sum(float(o[i]) for o, i in zip(objective, c.options, strict=True)) for c in by_size.frontier]
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(errors))


def test_the_result_is_plain_json_text_and_a_picture(by_size, tmp_path):
    values = json.loads(json.dumps(by_size.to_dict(), allow_nan=False))
    assert values["budget"] == "size=2.1x" and len(values["layers"]) == len(by_size.tradeoff.layers)
    assert values["measured"]["bytes"] == by_size.measured.size
    first = str(by_size).splitlines()
    assert first[0].startswith("size=2.1x: ") and [line.split(":")[0].strip() for line in first[1:]] == [
        "predicted", "measured", "w8a8 everywhere"
    ]  # fmt: skip
    largest = [max(entry.errors) for entry in by_size.layers]
    assert largest == sorted(largest, reverse=True)
    figure = frontier_plot(by_size)
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "best choices, predicted" in labels and "chosen for size=2.1x, predicted" in labels
    figure.savefig(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_the_size_is_least_for_a_psnr(calibrated):
    result = searched(calibrated, "psnr=42")
    assert result.choice.fidelity.psnr >= 42
    assert result.choice.size < result.uniform["w8a8"].size or result.uniform["w8a8"].fidelity.psnr < 42
    assert abs(result.measured.fidelity.psnr - result.choice.fidelity.psnr) < 2


def test_a_latency_is_that_of_the_layers(calibrated, monkeypatch):
    """Float takes one second more in each layer, and integers take ten together: two layers fit into 1.25 times."""
    monkeypatch.setattr(
        module,
        "layer_times",
        lambda layers, block, progress: LayerTimes(
            tuple(module_seconds(layer) for layer in layers), ("matmul_default",)
        ),
    )
    monkeypatch.setattr(module.StepTimer, "add", lambda self, name, program: self._calls.update({name: program}))
    monkeypatch.setattr(module.StepTimer, "seconds", lambda self: dict.fromkeys(self._calls, 10.0))
    result = searched(calibrated, "latency=1.25x")
    assert result.counts()["float"] == 2
    assert result.choice.seconds == pytest.approx(12.0) and result.measured.seconds == 10.0
    assert result.to_dict()["untimed"] == ["matmul_default"]
    assert "12000.00 ms" in str(result)
    assert frontier_plot(result).axes[0].get_xlabel() == "time of a step over that of w8a8 everywhere"


def module_seconds(layer):
    import torch

    return torch.tensor([float(widths.is_float) for widths in layer.options], dtype=torch.float64)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("size=0.01x", r"budget size=0\.01x cannot be met: these candidates reach from [\d.]+x to [\d.]+x"),
        ("psnr=80", r"budget psnr=80 cannot be met: the most that these candidates reach is a PSNR of [\d.]+ dB"),
    ],
)
def test_a_budget_out_of_reach_says_what_is_in_reach(calibrated, budget, words):
    with pytest.raises(ConfigError, match=words) as caught:
        searched(calibrated, budget, candidates="w8a8,w4a8")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"config": QuantizationConfig(weight_bits=4)}, ConfigError, "leave weight_bits and activation_bits out"),
        ({"config": QuantizationConfig(low_rank=4)}, ConfigError, "leave low_rank out"),
        ({"candidates": "w4a8,w8a8"}, ConfigError, "begin with w8a8"),
        ({"batches": []}, CalibrationError, "got no batches"),
    ],
)
def test_what_cannot_be_searched_is_refused(calibrated, options, error, words):
    data = options.pop("batches", batches())
    with pytest.raises(error, match=words):
        tfmq_fx.search_bits(calibrated.program, "size=2x", data, timesteps=TIMESTEPS, **options)
