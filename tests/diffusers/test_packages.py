"""Compiled code beside the weights: used where it is asked for and fits, else compiled, and that is said."""

import logging
import re
import shutil

import pytest
import torch
from diffusers import UNet2DModel

import tfmq_fx
from tests.diffusers.pipelines import noise
from tests.models import relative
from tfmq_fx.diffusers import TFMQConfig, load_lowered, to_diffusers

NAME = re.compile(r"denoiser\.[0-9a-f]{16}\.(bf16|f32)\.pt2")
INPUTS = noise(2, 3, 8, 8), torch.tensor(500)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (16,)}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    model = UNet2DModel(in_channels=3, out_channels=3, **sizes, **blocks).eval()
    # Float activations: of a model with next to no channels a rounding that falls the other way shows.
    config = tfmq_fx.QuantizationConfig(activation_bits=32)
    return tfmq_fx.quantize(model, config, [INPUTS], timesteps=[500], progress=False)


@pytest.fixture
def folder(program, tmp_path):
    to_diffusers(program).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def lowered(monkeypatch):
    """What was lowered while a model was loaded, by name and options; nothing is compiled."""
    calls = []

    def lower(program, backend, **options):
        calls.append((backend, options))
        return original(program, "reference")

    original = load_lowered.lower
    monkeypatch.setattr(load_lowered, "lower", lower)
    return calls


def load(folder, lower="aot"):
    return UNet2DModel.from_pretrained(folder, quantization_config=TFMQConfig(lower))


def test_a_package_is_compiled_once_and_found_again(folder, program, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        compiled = load(folder)
    (made,) = folder.glob("*.pt2")
    assert NAME.fullmatch(made.name) and f"there is no package of this program at {made} yet" in caplog.text
    monkeypatch.setattr(load_lowered, "lower", lambda *_, **__: pytest.fail("compiled again"))
    found = load(folder)
    assert found.served.denoiser.report.backend == "aot"
    assert torch.equal(found(*INPUTS).sample, compiled(*INPUTS).sample)
    assert relative(found(*INPUTS).sample, program(*INPUTS).sample) < 0.02
    # What a folder holds is never run unless it is asked for.
    monkeypatch.setattr(load_lowered, "load_denoiser", lambda *_: pytest.fail("loaded"))
    assert load(folder, None).is_quantized
    monkeypatch.undo()
    # A damaged one is compiled again, for which its place is known.
    with made.open("r+b") as file:
        file.truncate(made.stat().st_size // 2)
    calls = []
    monkeypatch.setattr(
        load_lowered, "lower", lambda p, b, **options: calls.append(options) or compiled.served.denoiser
    )
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert [options["path"] for options in calls] == [made] and "compiling again" in caplog.text


def test_one_of_another_program_or_machine_is_not_used(folder, lowered, monkeypatch, caplog):
    path = load_lowered.package_path(folder, "f32")
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b"\n")
    other = load_lowered.package_path(folder, "f32")
    assert other != path and other.parent == path.parent == folder
    shutil.copy(folder / "tensors.safetensors", load_lowered.package_path(folder, "bf16"))
    shutil.copy(folder / "tensors.safetensors", other)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert [backend for backend, _ in lowered] == ["aot"] and "compiling again" in caplog.text


def test_a_backend_without_packages_lowers_at_once(folder, lowered):
    model = UNet2DModel.from_pretrained(folder, quantization_config=TFMQConfig("inductor", "f32"))
    assert lowered == [("inductor", {"precision": "f32"})]
    assert model.served.denoiser.report.backend == "reference"
