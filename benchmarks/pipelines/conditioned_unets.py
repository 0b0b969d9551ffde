"""The UNet of Stable Diffusion with further conditions: images to enlarge, depth, image embeddings, frames."""

from __future__ import annotations

from typing import Any

import diffusers as d

from .image_unets import (
    EDIT,
    GUIDED,
    PICTURE,
    PROMPTS,
    WIDTH,
    autoencoder,
    dpm_solver,
    euler_karras,
    filled,
    text_encoder,
    tokenizer,
    unet,
)
from .row import Row, noise

__all__ = ["ROWS"]


def upscale() -> Any:
    """A small image is three channels more, its noise level a class label."""
    model = unet(in_channels=7, num_class_embeds=1000, use_linear_projection=True)
    return d.StableDiffusionUpscalePipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=model, low_res_scheduler=d.DDPMScheduler(),
        scheduler=d.DDIMScheduler(prediction_type="v_prediction"), max_noise_level=350,
    )  # fmt: skip


def latent_upscale() -> Any:
    """The UNet of k-diffusion: Fourier features of log sigma."""
    model = unet(
        in_channels=8, out_channels=5, block_out_channels=(32, 32, 64, 64), norm_num_groups=None, act_fn="gelu",
        time_cond_proj_dim=128 + WIDTH, conv_in_kernel=1, conv_out_kernel=1, mid_block_type=None,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3), resnet_time_scale_shift="scale_shift",
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"), time_embedding_type="fourier",
        timestep_post_act="gelu",
    )  # fmt: skip
    scheduler = d.EulerDiscreteScheduler(prediction_type="sample")
    return d.StableDiffusionLatentUpscalePipeline(autoencoder(), None, None, model, scheduler)


def depth_to_image() -> Any:
    """Depth is one channel more."""
    parts = {"text_encoder": None, "tokenizer": None, "depth_estimator": None, "feature_extractor": None}
    model = unet(in_channels=5, use_linear_projection=True)
    return d.StableDiffusionDepth2ImgPipeline(vae=autoencoder(), unet=model, scheduler=d.DDIMScheduler(), **parts)


def unclip() -> Any:
    """Stable unCLIP: an image embedding and its noise level are added to the embedding of the timestep."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=4, image_size=16,
        intermediate_size=37, patch_size=8,
    )  # fmt: skip
    model = unet(
        class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH, use_linear_projection=True
    )
    return d.StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=CLIPVisionModelWithProjection(config),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=None, text_encoder=None,
        unet=model, scheduler=d.DDIMScheduler(prediction_type="v_prediction"), vae=autoencoder(),
    )  # fmt: skip


def marigold() -> Any:
    """Depth of an image: its latents beside those of depth, no guidance."""
    return d.MarigoldDepthPipeline(
        unet=unet(in_channels=8, use_linear_projection=True), vae=autoencoder(),
        scheduler=d.DDIMScheduler(prediction_type="v_prediction"), text_encoder=text_encoder(), tokenizer=tokenizer(),
        prediction_type="depth", default_denoising_steps=3, default_processing_resolution=0,
    )  # fmt: skip


def animate() -> Any:
    """Frames: attention over time between the layers of a UNet of images."""
    adapter = d.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4
    )
    pipe = d.AnimateDiffPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet(), motion_adapter=adapter,
        scheduler=d.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip
    filled(pipe.unet)
    return pipe


POOLED = {"pooled_prompt_embeds": noise(1, WIDTH, seed=9), "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=10)}
THREE_TO_UPSCALE = {
    **PROMPTS, "image": PICTURE.repeat(3, 1, 1, 1),
    **{name: value.repeat(3, 1) for name, value in POOLED.items()},
}  # fmt: skip
THREE_PICTURES = {"image": noise(3, 3, 16, 16, seed=13).sigmoid(), "batch_size": 3}

ROWS = (
    Row("Stable Diffusion x4 upscaler", upscale, {**EDIT, "noise_level": 20}, other_scheduler=dpm_solver),
    Row(
        "Stable Diffusion latent upscaler",
        latent_upscale,
        {**EDIT, **POOLED},
        THREE_TO_UPSCALE,
        other_scheduler=euler_karras,
    ),
    Row(
        "Stable Diffusion depth to image",
        depth_to_image,
        {**EDIT, "depth_map": noise(1, 16, 16, seed=14), "strength": 0.8},
        other_scheduler=dpm_solver,
    ),
    Row("Stable unCLIP", unclip, {**GUIDED, "image": PICTURE, "noise_level": 10}, other_scheduler=euler_karras),
    Row(
        "Marigold depth",
        marigold,
        {"image": PICTURE, "output_type": "pt"},
        THREE_PICTURES,
        other_scheduler=lambda pipe: d.LCMScheduler.from_config(pipe.scheduler.config),
    ),
    Row("AnimateDiff", animate, {**GUIDED, "num_frames": 3}, PROMPTS, other_scheduler=dpm_solver),
)
