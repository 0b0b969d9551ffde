"""``search``, and ``quantize --config``, which takes what it writes."""

import json

import pytest

import tfmq_fx
from tests.cli.test_cli import refused, save_pipeline, tfmq
from tfmq_fx import QuantizationConfig
from tfmq_fx.search import search_bits as module

CALIBRATION = ("--steps", 3, "--calibration-samples", 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny", add_attention=False, **blocks)


def test_what_is_found_quantizes(model, tmp_path):
    out = tmp_path / "found"
    result = tfmq("search", model, "--budget", "psnr=35", "--out", out, *CALIBRATION)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "frontier.png", "search.json"]
    assert "most sensitive layers" in result.stdout
    lines = [line.split(":")[0].strip() for line in result.stdout.splitlines() if " × the float size" in line]
    assert lines == ["predicted", "measured", "w8a8 everywhere"]
    written = QuantizationConfig.from_dict(json.loads((out / "config.json").read_text()))
    assert any(values.get("weight_bits") == 4 for values in written.overrides.values())
    assert json.loads((out / "search.json").read_text())["config"] == written.to_dict()

    artefact = tmp_path / "artefact"
    more = ("--reconstruction", "nearest", "--seed", 3)
    result = tfmq("quantize", model, "--out", artefact, "--config", out / "config.json", *more, *CALIBRATION)
    assert result.exit_code == 0, result.output
    config = tfmq_fx.load(artefact).config
    assert config.overrides == written.overrides
    assert config.reconstruction.method == "nearest"  # what is given goes on top


def test_a_file_may_leave_fields_out(model, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"activation_bits": 7, "keep_float": []}))
    result = tfmq("quantize", model, "--out", tmp_path / "out", "--config", file, "--temporal", "shared", *CALIBRATION)
    assert result.exit_code == 0, result.output
    expected = QuantizationConfig(activation_bits=7, keep_float=(), temporal="shared")
    assert tfmq_fx.load(tmp_path / "out").config == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"weight_bit": 4}', "unknown configuration field 'weight_bit'"),
        ("[1]", "instead of a dictionary"),
        ('{"weight_bits": 9}', "weight_bits=9"),
    ],
)
@pytest.mark.parametrize("command", [("quantize",), ("search", "--budget", "size=0.5x")])
def test_a_file_that_is_none_is_refused(model, tmp_path, command, text, words):
    file, out = tmp_path / "config.json", tmp_path / "out"
    if text is not None:
        file.write_text(text)
    refused(tfmq(*command, model, "--out", out, "--config", file, *CALIBRATION), words)
    assert not out.exists()


def test_a_preset_and_a_file_exclude_each_other(model, tmp_path):
    refused(
        tfmq("quantize", model, "--out", tmp_path / "out", "--config", tmp_path / "x.json", "--preset", "shared"),
        "leave one of them out",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "0.2"), "write size=0.2x"),
        (("--budget", "size=0.2x", "--candidates", "w8a8,wide"), "'wide' is not supported"),
        (("--budget", "size=0.001x"), "cannot be met"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(model, tmp_path, options, words):
    refused(tfmq("search", model, "--out", tmp_path / "out", *options, *CALIBRATION), words)
    assert not (tmp_path / "out").exists()


def test_an_artefact_is_no_place_for_it(model, tmp_path):
    artefact = tmp_path / "artefact"
    assert tfmq("quantize", model, "--out", artefact, *CALIBRATION).exit_code == 0
    refused(tfmq("search", model, "--budget", "size=1x", "--out", artefact), "choose another folder")


def test_an_interrupted_search_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize", interrupted)
    result = tfmq("search", model, "--budget", "psnr=30", "--out", tmp_path / "out", *CALIBRATION)
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []
