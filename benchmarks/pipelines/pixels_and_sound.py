"""Models without a text: of pixels, of classes; and models of sound."""

from __future__ import annotations

from typing import Any

import diffusers as d

import tfmq_fx

from .image_transformers import autoencoder
from .row import Row, noise

__all__ = ["ROWS"]

#: Of prompt embeddings of sound.
TOKENS, WIDTH = 5, 16
ARRAY = {"output_type": "np"}


def pixels(**values: Any) -> d.UNet2DModel:
    """A UNet of 16 x 16 pixels, attention on one of two levels."""
    given = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (8, 16),
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8, **values,
    }  # fmt: skip
    return d.UNet2DModel(**given)


def ddpm() -> Any:
    """DDPM."""
    return d.DDPMPipeline(pixels(), d.DDPMScheduler())


def ddim() -> Any:
    """DDIM."""
    return d.DDIMPipeline(pixels(), d.DDIMScheduler())


def consistency() -> Any:
    """The consistency model of ImageNet 64: classes, and blocks that resample."""
    model = pixels(
        num_class_embeds=10, resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    return d.ConsistencyModelPipeline(model, d.CMStochasticIterativeScheduler(num_train_timesteps=40))


def other_consistency(_pipe: Any) -> Any:
    """Other noise levels: the pipeline takes this class alone."""
    return d.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_max=40.0)


def dit() -> Any:
    """DiT."""
    model = d.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return d.DiTPipeline(model, autoencoder(), d.DDIMScheduler())


def stable_audio() -> Any:
    """Stable Audio Open, with the scheduler that needs no torchsde."""
    model = d.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=WIDTH, time_proj_dim=8,
        global_states_input_dim=2 * WIDTH, cross_attention_input_dim=WIDTH,
    )  # fmt: skip
    decoder = d.AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
        decoder_input_channels=4, sampling_rate=16,
    )  # fmt: skip
    scheduler = d.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    lengths = d.StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32)
    return d.StableAudioPipeline(decoder, None, lengths, None, model, scheduler)


def dance_diffusion() -> Any:
    """Dance Diffusion: a UNet of waves."""
    model = d.UNet1DModel(
        sample_size=512, sample_rate=16000, extra_in_channels=16, time_embedding_dim=16, block_out_channels=(32, 32, 64)
    )
    return d.DanceDiffusionPipeline(model, d.IPNDMScheduler())


STABLE_AUDIO = {
    "prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=8),
    "guidance_scale": 7.0,
}  # fmt: skip

ROWS = (
    Row("DDPM", ddpm, ARRAY, {"batch_size": 3}, lambda pipe: d.DDIMScheduler.from_config(pipe.scheduler.config)),
    Row(
        "DDIM",
        ddim,
        ARRAY,
        {"batch_size": 3},
        lambda pipe: d.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"),
    ),
    Row(
        "Consistency model",
        consistency,
        {**ARRAY, "class_labels": [3]},
        {"batch_size": 3, "class_labels": [3, 3, 3]},
        other_consistency,
        options={"finite": ("class_labels",)},
    ),
    Row(
        "DiT",
        dit,
        {**ARRAY, "class_labels": [3], "guidance_scale": 4.0},
        {"class_labels": [3, 3, 3]},
        lambda pipe: d.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config),
        options={"finite": ("class_labels",)},
    ),
    Row(
        "Stable Audio",
        stable_audio,
        STABLE_AUDIO,
        {"num_waveforms_per_prompt": 3},
        lambda pipe: d.EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, sigma_schedule="karras"),
    ),
    # It has no temporal block, and the refusal says what to do.
    Row(
        "Dance Diffusion",
        dance_diffusion,
        {},
        {"batch_size": 3},
        options={"config": tfmq_fx.QuantizationConfig(temporal="float")},
    ),
)
