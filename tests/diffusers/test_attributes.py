"""What pipelines read on their models is there; what a quantized model cannot do says what to do instead."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from diffusers import FluxTransformer2DModel, HunyuanDiT2DModel, LTX2VideoTransformer3DModel, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin

import tfmq_fx
from tests.diffusers.pipelines import CASES, TOKENS, WIDTH, noise
from tests.models import relative
from tfmq_fx import UnsupportedError
from tfmq_fx.diffusers import to_diffusers
from tfmq_fx.diffusers.output_class import output_class
from tfmq_fx.diffusers.refusals import REFUSALS
from tfmq_fx.diffusers.served import ServedProgram
from tfmq_fx.diffusers.skeleton import empty_model


def inputs(batch=2):
    return noise(batch, 4, 8, 8), torch.tensor(500), noise(batch, TOKENS, WIDTH, seed=3)


def test_it_holds_no_weights_and_says_what_it_is(unet, quantized):
    program = quantized("sd")
    assert unet.dtype is torch.float32 and unet.device == torch.device("cpu") and not unet.training
    assert [parameter.numel() for parameter in unet.parameters()] == [0]
    assert next(unet.parameters()).dtype is torch.float32 and not [*unet.buffers()]
    stored = [*program.graph_module.parameters(), *program.graph_module.buffers()]
    assert unet.get_memory_footprint() == sum(t.numel() * t.element_size() for t in stored)
    assert unet.is_quantized and unet.quantization_method.value == "tfmq_fx"
    assert unet.served.program is program and unet.served.denoiser.report.backend == "reference"
    assert type(unet) is UNet2DConditionModel
    assert inspect.signature(unet.forward) == inspect.signature(UNet2DConditionModel.forward.__get__(unet))


def test_attributes_that_pipelines_read(quantized):
    sdxl = to_diffusers(quantized("sdxl"))
    assert sdxl.add_embedding.linear_1.in_features == WIDTH + 6 * 8
    flux = to_diffusers(quantized("flux"))
    with flux.cache_context("cond"):
        assert flux.config.guidance_embeds is False
    assert sdxl.encoder_hid_proj is None and set(sdxl.attn_processors)
    assert sdxl.in_channels == 4  # with diffusers' own warning that it has moved to the configuration


def skeleton(model):
    interface = tfmq_fx.frontend.interface.Interface((), None, (), config=dict(model.config))
    return empty_model(type(model), interface)


def test_skeletons_have_what_is_computed_from_their_configuration():
    """HunyuanDiT's sizes, and the positions of LTX 2, which no program has."""
    hunyuan = HunyuanDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    empty = skeleton(hunyuan)
    assert (empty.inner_dim, empty.num_heads) == (hunyuan.inner_dim, hunyuan.num_heads)
    video = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=1, caption_channels=16,
    )  # fmt: skip
    empty = skeleton(video)
    place = {"batch_size": 1, "num_frames": 2, "height": 4, "width": 4, "device": torch.device("cpu")}
    assert torch.equal(empty.rope.prepare_video_coords(**place), video.rope.prepare_video_coords(**place))


def test_none_and_empty_keywords_are_taken_and_the_result_is_as_asked(unet, quantized):
    sample, timestep, prompt = inputs()
    keywords = {"encoder_hidden_states": prompt, "timestep_cond": None, "added_cond_kwargs": None, "class_labels": None}
    result = unet(sample, timestep, **keywords, cross_attention_kwargs={}, down_block_additional_residuals=None)
    assert type(result).__name__ == "UNet2DConditionOutput" and result.sample.shape == sample.shape
    (alone,) = unet(sample, timestep, **keywords, return_dict=False)
    assert torch.equal(alone, result.sample)
    assert relative(alone, quantized("sd")(sample, timestep, prompt).sample) < 1e-5
    with pytest.raises(tfmq_fx.InputError, match="'mid_block_additional_residual' was not captured"):
        unet(sample, timestep, prompt, mid_block_additional_residual=sample)


def test_a_program_that_gives_tuples_gives_the_output_class_where_it_is_asked_for():
    model = CASES["ddpm"].pipeline().unet
    batch = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor([100, 500]), "return_dict": False}
    config = tfmq_fx.QuantizationConfig(activation_groups=1, scale_channels=False)
    program = tfmq_fx.quantize(model, config, [batch], timesteps=[100, 500], progress=False)
    served = to_diffusers(program, "reference")
    result = served(batch["sample"], batch["timestep"])
    assert type(result).__name__ == "UNet2DOutput"
    assert torch.equal(served(**batch)[0], result.sample)


FAMILIES = (
    "UNet2DModel", "UNetSpatioTemporalConditionModel", "FluxTransformer2DModel", "DiTTransformer2DModel",
    "SanaTransformer2DModel", "WanTransformer3DModel",
)  # fmt: skip


@pytest.mark.parametrize("model_class", FAMILIES)
def test_output_classes_are_read_off_the_models(model_class):
    import diffusers

    found = output_class(getattr(diffusers, model_class))
    assert found is not None and "sample" in found.__dataclass_fields__


def test_it_stays_where_and_what_it_is(unet):
    for same in (unet.to("cpu"), unet.to(torch.device("cpu")), unet.to(torch.float32), unet.float(), unet.eval(),
                 unet.to("cpu", torch.float32), unet.to(memory_format=torch.channels_last), unet.train(False),
                 unet.requires_grad_(False)):  # fmt: skip
        assert same is unet
    casts = (lambda: unet.to(torch.float16), unet.half, lambda: unet.to(dtype=torch.bfloat16), unet.double,
             lambda: unet.to("cpu", torch.float16))  # fmt: skip
    for cast in casts:
        with pytest.raises(
            UnsupportedError, match=r"stays in float32, and cannot be cast to .*quantize the float model"
        ):
            cast()
    for move in (lambda: unet.to("meta"), unet.cuda, lambda: unet.to("cuda", torch.float16)):
        with pytest.raises(ValueError, match="runs on the CPU, and cannot be moved"):
            move()
    with pytest.raises(UnsupportedError, match=r"no training mode.*train the float model"):
        unet.train()
    with pytest.raises(UnsupportedError, match="no gradients"):
        unet.requires_grad_()


def test_a_pipeline_keeps_it(unet):
    pipeline = CASES["sd"].pipeline()
    pipeline.unet = unet
    assert pipeline.to("cpu").device == torch.device("cpu") and pipeline.dtype is torch.float32
    with pytest.raises(UnsupportedError, match="cannot be cast to float16"):
        pipeline.to(torch.float16)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_had_says_what_to_do(name, quantized, unet):
    model = next((m for m in (unet, to_diffusers(quantized("flux"))) if hasattr(type(m), name)), None)
    if model is None:
        assert not hasattr(ModelMixin, name)
        pytest.skip("of other families")
    with pytest.raises(UnsupportedError, match=name.lstrip("_")) as caught:
        getattr(model, name)()
    assert len(str(caught.value)) > 60 and str(caught.value).count(". ") == 0


def test_no_method_is_added_that_the_original_has_not(quantized):
    flux = to_diffusers(quantized("flux"))
    assert not hasattr(FluxTransformer2DModel, "enable_freeu") and not hasattr(flux, "enable_freeu")


def test_copies_share_the_program_and_nothing_is_pickled(unet):
    sample, timestep, prompt = inputs()
    wanted = unet(sample, timestep, prompt).sample
    for made in (copy.deepcopy(unet), copy.copy(unet)):
        assert made is not unet and made.served.program is unet.served.program
        assert torch.equal(made(sample, timestep, prompt).sample, wanted)
    with pytest.raises(UnsupportedError, match="cannot be pickled: write it with save_pretrained"):
        pickle.dumps(unet)
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        pickle.dumps(ServedProgram(unet.served.program))


def test_it_is_not_quantized_again(unet):
    with pytest.raises(tfmq_fx.CaptureError, match="the UNet2DConditionModel is quantized already; capture the float"):
        tfmq_fx.capture(unet, inputs())


def test_a_new_model_of_its_class_has_weights(unet):
    made = type(unet).from_config(unet.config)
    assert type(made) is UNet2DConditionModel and made.device.type == "cpu"


def test_a_denoiser_is_put_in_place_too(quantized, tmp_path):
    program = quantized("sd")
    denoiser = tfmq_fx.lower(program, "reference")
    alone, both = to_diffusers(denoiser), to_diffusers(program, denoiser)
    arguments = inputs()
    assert alone.served.denoiser is both.served.denoiser is denoiser
    assert torch.equal(alone(*arguments).sample, denoiser(*arguments).sample)
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(UnsupportedError, match=r"does not hold its quantized program; make it with to_diffusers\(pro"):
        alone.save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_what_is_no_program_of_diffusers_is_refused(quantized):
    with pytest.raises(tfmq_fx.LoweringError, match="needs a quantized program or a denoiser, it was given a UNet2D"):
        to_diffusers(CASES["ddpm"].pipeline().unet)
    with pytest.raises(tfmq_fx.LoweringError, match="lowered already"):
        to_diffusers(tfmq_fx.lower(quantized("sd"), "reference"), "reference")
    with pytest.raises(tfmq_fx.LoweringError, match="backend='eager' is not supported"):
        to_diffusers(quantized("sd"), "eager")
    interface = tfmq_fx.frontend.interface.Interface((), None, (), model_class="DDIMScheduler")
    foreign = dataclasses.replace(quantized("sd"), interface=interface)
    with pytest.raises(UnsupportedError, match="made from 'DDIMScheduler', which is no model class of diffusers"):
        to_diffusers(foreign)
