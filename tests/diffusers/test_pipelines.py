"""Quantized models of many families sample in their pipelines, and are saved and loaded by diffusers' own calls."""

import json

import pytest
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusionImg2ImgPipeline

from tests.diffusers.pipelines import CASES
from tests.models import relative
from tfmq_fx.diffusers import TFMQConfig, to_diffusers

#: Those that are quantized within seconds; a video model takes longer.
QUICK = ("ddpm", "sd", "sdxl", "sd3", "flux", "pixart", "dit", "wan")


@pytest.mark.parametrize("name", QUICK)
def test_a_quantized_model_stands_in_its_pipeline_and_is_saved_with_it(name, quantized, tmp_path):
    case = CASES[name]
    pipeline = case.pipeline()
    original = getattr(pipeline, case.component)
    wanted = case.sample(pipeline)

    model = to_diffusers(quantized(name), "reference")
    setattr(pipeline, case.component, model)
    assert type(model) is type(original)
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    assert json.dumps(config, sort_keys=True) == json.dumps(original.config, sort_keys=True)
    images = case.sample(pipeline)
    assert relative(images.double(), wanted.double()) < 0.1

    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index[case.component] == ["diffusers", type(original).__name__]
    mapping = PipelineQuantizationConfig(quant_mapping={case.component: TFMQConfig("reference")})
    loaded = type(pipeline).from_pretrained(tmp_path, quantization_config=mapping, **case.absent(pipeline))
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(case.sample(loaded), images)
    assert getattr(loaded, case.component).served.denoiser.report.backend == "reference"


def test_what_was_loaded_is_saved_and_loaded_again(saved, tmp_path):
    case, first = CASES["ddpm"], saved("ddpm")
    pipeline = type(case.pipeline()).from_pretrained(first)
    pipeline.save_pretrained(tmp_path)
    # Over itself, as users do after a change of the scheduler.
    pipeline.save_pretrained(tmp_path)
    images = []
    for folder in (first, tmp_path):
        pipeline.unet = type(pipeline.unet).from_pretrained(
            folder / "unet", quantization_config=TFMQConfig("reference")
        )
        images.append(case.sample(pipeline))
    assert torch.equal(*images)


def test_another_pipeline_takes_over_the_model(quantized, unet):
    pipeline = CASES["sd"].pipeline()
    pipeline.unet = unet
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is unet
    arguments = {**CASES["sd"].arguments, "image": torch.rand(1, 3, 16, 16), "strength": 0.9}
    del arguments["height"], arguments["width"]
    images = other(num_inference_steps=3, **arguments).images
    assert images.shape == (1, 3, 16, 16) and bool(torch.isfinite(images).all())


def test_a_folder_of_a_float_model_is_not_overwritten(quantized, tmp_path):
    case = CASES["ddpm"]
    pipeline = case.pipeline()
    pipeline.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "unet").iterdir()}
    pipeline.unet = to_diffusers(quantized("ddpm"))
    with pytest.raises(ValueError, match="exists and is not an artefact of tfmq_fx; choose another path"):
        pipeline.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "unet").iterdir()} == before
