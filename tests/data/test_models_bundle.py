import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel

from tests.models import tiny_unet
from tfmq_fx import CaptureError
from tfmq_fx.data.bundled_model import bundled_model_path, load_model


@pytest.fixture
def pipeline_folder(tmp_path):
    DDPMPipeline(tiny_unet().half(), DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def refused(path, words):
    with pytest.raises(CaptureError, match=words) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_pipeline_folder_in_half_precision_is_loaded_in_float32(pipeline_folder):
    for path in (pipeline_folder, str(pipeline_folder)):
        model, scheduler = load_model(path)
        assert isinstance(model, UNet2DModel)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.conv_in.weight, tiny_unet().conv_in.weight.half().float())
        assert isinstance(scheduler, DDPMScheduler)
        assert scheduler.config.beta_end == 0.03


def test_a_bare_model_folder_gets_the_default_scheduler_or_the_one_beside_it(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path)[1], DDPMScheduler)
    EulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    assert isinstance(load_model(tmp_path)[1], EulerDiscreteScheduler)


def test_missing_foreign_and_damaged_folders_are_one_clear_sentence(tmp_path, pipeline_folder):
    refused(tmp_path / "nowhere", "no model folder")
    refused("./nowhere", "no model folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither model_index.json nor config.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(tmp_path / "empty", "cannot be read as JSON")
    (tmp_path / "empty" / "config.json").write_text("[]")
    refused(tmp_path / "empty", "holds a list")
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "BertModel"}')
    refused(tmp_path / "empty", "not a diffusers model: its class is 'BertModel'")
    weights = next((pipeline_folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(pipeline_folder, "UNet2DModel in .* cannot be loaded")


def test_what_takes_no_timestep_is_no_diffusion_model(tmp_path, pipeline_folder):
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    refused(tmp_path / "vae", "AutoencoderKL, which takes no timestep")
    index = pipeline_folder / "model_index.json"
    content = json.loads(index.read_text())
    del content["unet"]
    index.write_text(json.dumps(content))
    refused(pipeline_folder, "no unet or transformer")


def test_an_unknown_scheduler_is_one_clear_sentence(pipeline_folder):
    index = pipeline_folder / "model_index.json"
    content = json.loads(index.read_text())
    content["scheduler"][1] = "NoSuchScheduler"
    index.write_text(json.dumps(content))
    refused(pipeline_folder, "'NoSuchScheduler', which diffusers does not have")


def test_an_id_that_the_hub_does_not_give_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/no-such-model", "Hugging Face Hub does not give it")


def test_an_id_is_loaded_from_the_hub(monkeypatch, pipeline_folder):
    """The Hub is replaced by a local folder: what is tested is which parts are asked for."""
    import diffusers

    def here(method):
        return classmethod(lambda cls, name, *args, **kwargs: method(str(pipeline_folder), *args, **kwargs))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", here(diffusers.DiffusionPipeline.load_config))
    monkeypatch.setattr(UNet2DModel, "from_pretrained", here(UNet2DModel.from_pretrained))
    monkeypatch.setattr(DDPMScheduler, "from_pretrained", here(DDPMScheduler.from_pretrained))
    model, scheduler = load_model("somebody/some-model")
    assert isinstance(model, UNet2DModel)
    assert scheduler.config.beta_end == 0.03


def test_the_bundled_model(monkeypatch, tmp_path):
    model, scheduler = load_model()
    assert (bundled_model_path() / "model_index.json").is_file()
    assert isinstance(model, UNet2DModel)
    assert isinstance(scheduler, DDPMScheduler | DDIMScheduler)
    monkeypatch.setattr("tfmq_fx.data.bundled_model.bundled_model_path", lambda: tmp_path / "gone")
    refused(None, "bundled model is missing")
