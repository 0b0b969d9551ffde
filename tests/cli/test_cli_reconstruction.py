"""Reconstruction from the command line: the artefact records it; its state goes with success, stays with Ctrl-C."""

import json

import pytest

import tfmq_fx
from tests.cli.test_cli import save_pipeline, tfmq
from tfmq_fx.config.reconstruction import ReconstructionConfig
from tfmq_fx.reconstruction.progress import ReconstructionProgress


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny", add_attention=False, **blocks)


def quantize(model, out, name, *more):
    options = ("--steps", 2, "--calibration-samples", 4, "--weight-bits", 4, "--reconstruction", name)
    return tfmq("quantize", model, "--out", out, *options, "--temporal-iterations", 20, *more)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "tiny-w4"
    return quantize(model, out, "tiar"), out


def test_the_artefact_records_the_reconstruction_and_the_state_is_gone(done):
    result, out = done
    assert result.exit_code == 0, result.output
    assert "1 of 1 units reconstructed" in result.output and "of the roundings changed" in result.output
    assert [path.name for path in out.parent.iterdir()] == ["tiny-w4"]
    config = ReconstructionConfig(granularity="none", temporal_iterations=20)
    assert tfmq_fx.load(out).config.reconstruction == config
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["reconstruction"]["temporal_iterations"] == 20


def test_the_kind_of_a_unit_is_printed(done):
    assert "temporal block [temporal]" in done[0].output


def test_an_interrupt_keeps_the_state_and_the_same_command_goes_on(model, tmp_path, monkeypatch):
    out, state = tmp_path / "tiny-w4", tmp_path / ".tiny-w4.reconstruction"
    started = []

    def interrupt(self, iteration, loss):
        if len(started) > 1:  # the temporal block is done, the first block is not
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ReconstructionProgress, "start", lambda self, name: started.append(name))
        patched.setattr(ReconstructionProgress, "advance", interrupt)
        assert quantize(model, out, "tfmq-dm", "--iterations", 2).exit_code == 130
    assert not out.exists()
    assert {path.name for path in state.iterdir()} == {"plan.json", "unit-0000.safetensors"}
    trained = []
    monkeypatch.setattr(ReconstructionProgress, "start", lambda self, name: trained.append(name))
    result = quantize(model, out, "tfmq-dm", "--iterations", 2, "--cache-gib", 0)
    assert result.exit_code == 0, result.output
    assert trained and "temporal block" not in trained
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-w4"]
