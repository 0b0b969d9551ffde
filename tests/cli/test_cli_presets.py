"""Published methods from the command line: what the preset says, and what options change of it."""

import pytest

import tfmq_fx
from tests.cli.test_cli import refused, save_pipeline, tfmq
from tfmq_fx import QuantizationConfig
from tfmq_fx.config.presets import PRESETS
from tfmq_fx.data import NormalTimesteps, UniformTimesteps

CALIBRATION = ("--steps", 2, "--calibration-samples", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny", add_attention=False, **blocks)


def test_the_list_describes_every_preset():
    result = tfmq("presets")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert all(name in text and preset.source.split(",")[0] in text for name, preset in PRESETS.items())


@pytest.mark.parametrize(("name", "drawn"), [("ptq4dm", NormalTimesteps), ("shared", UniformTimesteps)])
def test_a_preset_decides_what_is_not_given(model, tmp_path, monkeypatch, name, drawn):
    draws = []
    for kind in (NormalTimesteps, UniformTimesteps):
        draw = kind.draw
        monkeypatch.setattr(kind, "draw", lambda self, *a, draw=draw, kind=kind: draws.append(kind) or draw(self, *a))
    out = tmp_path / "tiny"
    result = tfmq("quantize", model, "--out", out, "--preset", name, "--activation-bits", 7, *CALIBRATION)
    assert result.exit_code == 0, result.output
    assert tfmq_fx.load(out).config == QuantizationConfig.preset(name, activation_bits=7)
    assert set(draws) == {drawn}
    assert ("wrap the scheduler in tfmq_fx.schedulers.QuantizedSampleScheduler" in result.stdout) == (name == "ptq4dm")


def test_options_go_on_top_of_a_preset(model, tmp_path):
    out = tmp_path / "tiny"
    more = ("--weight-bits", 4, "--temporal-iterations", 3, "--iterations", 2, "--keep-float", "input", "--seed", 5)
    result = tfmq("quantize", model, "--out", out, "--preset", "tfmq-dm", *more, *CALIBRATION)
    assert result.exit_code == 0, result.output
    config = tfmq_fx.load(out).config
    assert (config.weight_bits, config.weight_range, config.keep_float) == (4, "mse", ("input",))
    learned = config.reconstruction
    assert (learned.temporal, learned.iterations, learned.temporal_iterations, learned.seed) == ("tiar", 2, 3, 5)
    result = tfmq("quantize", model, "--out", out, "--preset", "tfmq-dm", "--reconstruction", "none", *CALIBRATION)
    assert result.exit_code == 0, result.output
    assert tfmq_fx.load(out).config == QuantizationConfig.preset("tfmq-dm", reconstruction="none")


WITHOUT_EFFECT = [
    (("--iterations", 5), "--iterations", "reconstruction"),
    (("--temporal-iterations", 5), "--temporal-iterations", "reconstruction"),
    (("--cache-gib", 1), "--cache-gib", "reconstruction"),
    (("--preset", "shared", "--iterations", 5), "--iterations", "reconstruction"),
    (("--preset", "tfmq-dm", "--reconstruction", "none", "--cache-gib", 1), "--cache-gib", "reconstruction"),
    (("--weight-bits", 4, "--iterations", 5), "--iterations", "trains blocks"),
    (("--reconstruction", "gptq", "--temporal-iterations", 5), "--temporal-iterations", "the temporal block"),
    (("--reconstruction", "tiar", "--iterations", 5), "--iterations", "trains blocks"),
    (("--reconstruction", "brecq", "--temporal-iterations", 5), "--temporal-iterations", "the temporal block"),
    (("--ndtc-mean", 0.3), "--ndtc-mean", "--sampler ndtc"),
    (("--preset", "ptq4dm", "--sampler", "uniform", "--ndtc-mean", 0.3), "--ndtc-mean", "--sampler ndtc"),
    (("--activation-bits", 32, "--activation-range", "mse"), "--activation-range", "--activation-bits below 32"),
]


@pytest.mark.parametrize(("options", "option", "words"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused_before_the_work(tmp_path, options, option, words):
    result = tfmq("quantize", "no-such-folder/model", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    text = " ".join(result.stderr.replace("│", " ").split())
    assert f"Invalid value for {option}: it has no effect without" in text and words in text


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "tfmq-dm", "--iterations", 5, "--cache-gib", 1),
        ("--preset", "ptq4dm", "--ndtc-mean", 0.3),
        ("--preset", "ptq4dm", "--activation-bits", 32, "--activation-range", "mse"),
    ],
)
def test_a_preset_s_settings_give_an_option_its_effect(tmp_path, options):
    result = tfmq("quantize", tmp_path / "no-such-model", "--out", tmp_path / "out", *options)
    refused(result, "no-such-model")  # taken: what is refused is the model


def test_an_unknown_preset_is_one_sentence(model, tmp_path):
    refused(tfmq("quantize", model, "--out", tmp_path / "x", "--preset", "nope"), "preset='nope' is not supported")
