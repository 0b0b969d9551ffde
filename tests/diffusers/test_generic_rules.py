"""What diffusers' own tests of its quantizers ask of each, as far as it is no matter of one method."""

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.quantizers.base import DiffusersQuantizer

from tests.diffusers.pipelines import noise
from tfmq_fx import UnsupportedError
from tfmq_fx.diffusers import TFMQConfig


@pytest.fixture
def model(saved):
    return UNet2DModel.from_pretrained(saved("ddpm") / "unet", quantization_config=TFMQConfig("reference"))


def test_the_model_says_that_it_is_quantized(model):
    assert isinstance(model.hf_quantizer, DiffusersQuantizer)
    assert model.hf_quantizer.is_serializable and not model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_compileable and not model.training
    assert model.is_quantized and model.quantization_method == "tfmq_fx"
    assert model.config.quantization_config.quant_method == "tfmq_fx"


def test_its_configuration_goes_to_json(model):
    text = model.to_json_string()
    assert '"quant_method": "tfmq_fx"' in text and "_pre_quantization_dtype" not in text
    assert model.config["_pre_quantization_dtype"] is None


def test_it_takes_less_memory(model, quantized):
    assert model.get_memory_footprint() == model.served.memory_footprint() > 0
    weights = quantized("ddpm").graph_module.state_dict().values()
    assert any(weight.dtype is torch.int8 for weight in weights)


def test_the_original_configuration_is_not_changed(saved):
    config = TFMQConfig("reference")
    before = config.to_dict()
    UNet2DModel.from_pretrained(saved("ddpm") / "unet", quantization_config=config)
    assert config.to_dict() == before == {"quant_method": "tfmq_fx"}


@pytest.mark.parametrize("dtype", [None, torch.float32, {"unet": torch.float32}])
def test_the_dtype_of_the_program_may_be_asked_for(saved, dtype):
    pipeline = DDPMPipeline.from_pretrained(saved("ddpm"), torch_dtype=dtype)
    assert pipeline.unet.dtype is torch.float32


def test_another_dtype_may_not(saved):
    with pytest.raises(
        UnsupportedError, match=r"quantized in torch.float32 and cannot be loaded in torch.float16: pass"
    ):
        DDPMPipeline.from_pretrained(saved("ddpm"), torch_dtype=torch.float16)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_the_processor_may_be_asked_for(saved, device_map):
    model = UNet2DModel.from_pretrained(saved("ddpm") / "unet", device_map=device_map)
    assert model.device == torch.device("cpu") and not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("device_map", ["cuda", 0, "auto", {"": "meta"}])
def test_another_device_may_not(saved, device_map):
    with pytest.raises(UnsupportedError, match="runs on the CPU: leave device_map="):
        UNet2DModel.from_pretrained(saved("ddpm") / "unet", device_map=device_map)


def test_it_is_not_materialized_for_loading(saved):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        UNet2DModel.from_pretrained(saved("ddpm") / "unet", low_cpu_mem_usage=False)


def test_loading_says_that_nothing_is_missing(saved, caplog):
    model, info = UNet2DModel.from_pretrained(saved("ddpm") / "unet", output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert model.is_quantized
    assert not [record for record in caplog.records if "newly initialized" in record.getMessage()]


def test_a_round_trip_is_exact(model, tmp_path):
    sample, timestep = noise(2, 3, 8, 8), torch.tensor(10)
    wanted = model(sample, timestep).sample
    model.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path, quantization_config=TFMQConfig("reference"))
    assert torch.equal(again(sample, timestep).sample, wanted)


def test_it_is_lowered_when_it_is_first_called(saved, monkeypatch):
    """Not while it is loaded, and once."""
    from tfmq_fx.diffusers import served

    lowered = []

    def lower(program):
        lowered.append(program)
        return original(program, "reference")

    original = served.lower
    monkeypatch.setattr(served, "lower", lower)
    model = UNet2DModel.from_pretrained(saved("ddpm") / "unet")
    assert not lowered
    for _ in range(2):
        model(noise(2, 3, 8, 8), 10)
    assert lowered == [model.served.program]


def test_accelerate_is_asked_for(saved, monkeypatch):
    from tfmq_fx.diffusers import skeleton

    monkeypatch.setattr(skeleton.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'pip install "tfmq-fx\[diffusers\]"'):
        UNet2DModel.from_pretrained(saved("ddpm") / "unet")
