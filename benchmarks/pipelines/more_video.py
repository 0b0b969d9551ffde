"""Text and images to video: Mochi, Allegro, Latte, SANA-Video, ModelScope, I2VGenXL, EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers as d
from transformers import CLIPVisionModelWithProjection

from .image_unets import autoencoder
from .row import Row
from .video import (
    IMAGE,
    MASKS,
    PROMPT,
    SIZE,
    THREE,
    TOKENS,
    VIDEO,
    WIDTH,
    flow_unipc,
    image_processor,
    longer_shift,
    repeated,
    trained,
    vision,
    wan_vae,
)

__all__ = ["ROWS"]


def allegro() -> Any:
    """Allegro, whose autoencoder decodes only tiles, of 24 frames at least."""
    model = d.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_width=4, sample_height=4, sample_frames=6, caption_channels=WIDTH,
    )  # fmt: skip
    vae = d.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_size=32,
    )  # fmt: skip
    # As many pixels between tiles as a tile has: one tile.
    vae.stride = vae.kernel
    vae.enable_tiling()
    # It decodes tiles of one video only.
    vae.enable_slicing()
    scheduler = d.EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_schedule="scaled_linear")
    return d.AllegroPipeline(None, None, vae, model, scheduler)


def latte() -> Any:
    """Latte."""
    model = d.LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        caption_channels=WIDTH, cross_attention_dim=24, out_channels=8, attention_bias=True, video_length=5,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    scheduler = d.DDIMScheduler(beta_start=0.0001, beta_schedule="linear", clip_sample=False)
    return d.LattePipeline(None, None, autoencoder(), model, scheduler)


def modelscope() -> Any:
    """ModelScope's text to video."""
    model = d.UNet3DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    scheduler = d.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return d.TextToVideoSDPipeline(autoencoder(), None, None, trained(model), scheduler)


def i2vgen_xl() -> Any:
    """I2VGenXL."""
    model = d.I2VGenXLUNet(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    scheduler = d.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    return d.I2VGenXLPipeline(
        autoencoder(), None, None, vision(CLIPVisionModelWithProjection), image_processor(), trained(model), scheduler
    )


def sana_video() -> Any:
    """SANA-Video: linear attention."""
    model = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH,
        mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return d.SanaVideoPipeline(None, None, wan_vae(), model, d.FlowMatchEulerDiscreteScheduler(shift=7.0))


def easyanimate() -> Any:
    """EasyAnimate 5.1."""
    model = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, num_layers=2,
        mmdit_layers=1, text_embed_dim=WIDTH, sample_width=4, sample_height=4, patch_size=2,
    )  # fmt: skip
    vae = d.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return d.EasyAnimatePipeline(vae, None, None, model, d.FlowMatchEulerDiscreteScheduler(shift=5.0))


def mochi() -> Any:
    """Mochi 1."""
    model = d.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, qk_norm="rms_norm", text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=TOKENS,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return d.MochiPipeline(scheduler, autoencoder, None, None, trained(model))


#: It takes no image smaller than this.
SANA_VIDEO = {"height": 32, "width": 32, "frames": 9, "negative_prompt": None, "use_resolution_binning": False}

ROWS = (
    Row(
        "Mochi 1",
        mochi,
        {**PROMPT, **MASKS, **VIDEO, "num_frames": 7, "guidance_scale": 4.5},
        repeated(PROMPT, MASKS),
        longer_shift,
    ),
    Row(
        "Allegro",
        allegro,
        {**PROMPT, **MASKS, **VIDEO, "negative_prompt": None, "num_frames": 24, "guidance_scale": 7.5},
        repeated(PROMPT, MASKS),
        lambda pipe: d.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False),
    ),
    Row(
        "Latte",
        latte,
        {**PROMPT, **SIZE, "negative_prompt": None, "video_length": 5, "guidance_scale": 7.5},
        {"num_images_per_prompt": 3},
        lambda pipe: d.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config),
    ),
    Row(
        "SANA-Video",
        sana_video,
        {**PROMPT, **MASKS, **SIZE, **SANA_VIDEO, "guidance_scale": 6.0},
        THREE,
        flow_unipc,
    ),
    Row(
        "ModelScope text to video",
        modelscope,
        {**PROMPT, **SIZE, "num_frames": 5, "guidance_scale": 9.0},
        repeated(PROMPT),
        lambda pipe: d.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True),
    ),
    Row(
        "I2VGenXL",
        i2vgen_xl,
        {**PROMPT, **SIZE, "image": IMAGE, "num_frames": 5, "guidance_scale": 9.0},
        THREE,
        lambda pipe: d.EulerDiscreteScheduler.from_config(pipe.scheduler.config),
    ),
    Row(
        "EasyAnimate",
        easyanimate,
        {**PROMPT, **MASKS, **VIDEO, "guidance_scale": 5.0},
        {"num_images_per_prompt": 3},
        longer_shift,
    ),
)
