"""Text and images to video: Stable Video Diffusion, Wan, SkyReels, CogVideoX; and what videos have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers as d
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from .row import Row, noise

__all__ = ["ROWS"]

#: Of prompt embeddings.
TOKENS, WIDTH = 5, 32
#: Pixels of the images that are given.
IMAGE_SIZE = 32
PROMPT = {"prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=8)}
MASKS = {
    "prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
    "negative_prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
}
VIDEO = {"output_type": "pt", "height": 32, "width": 32, "num_frames": 9}
#: Smaller, where a pipeline takes it.
SIZE = {"output_type": "pt", "height": 16, "width": 16}
#: Where an image is given, Wan's attention takes what comes before the last 512 tokens for the image.
WAN_IMAGE_PROMPT = {
    "prompt_embeds": noise(1, 512, WIDTH), "negative_prompt_embeds": noise(1, 512, WIDTH, seed=8),
}  # fmt: skip
#: An image of floats from 0 to 1.
IMAGE = noise(1, 3, IMAGE_SIZE, IMAGE_SIZE).sigmoid()
THREE = {"num_videos_per_prompt": 3}


def repeated(*arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three prompts, where a pipeline does not repeat embeddings itself."""
    return {name: value.repeat_interleave(3, 0) for given in arguments for name, value in given.items()}


def trained(model: Any) -> Any:
    """Random numbers for weights that start from zeros, as if it had been trained: its blocks are the identity else."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith("bias") and not weight.any():
                weight.normal_(std=0.05)
    return model


def longer_shift(pipe: Any) -> Any:
    """Euler steps for flow matching, at other noise levels."""
    return d.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=3.0)


def flow_unipc(pipe: Any = None, shift: float = 3.0) -> Any:
    """Steps of higher order for flow matching."""
    return d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def vision(kind: Any, **values: Any) -> Any:
    """A CLIP image encoder, one layer."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=4, image_size=IMAGE_SIZE,
        intermediate_size=37, patch_size=8, **values,
    )  # fmt: skip
    return kind(config)


def image_processor() -> Any:
    """The preprocessing of the image encoder."""
    return CLIPImageProcessor(crop_size=IMAGE_SIZE, size=IMAGE_SIZE)


def stable_video_diffusion() -> Any:
    """Stable Video Diffusion."""
    model = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
        num_attention_heads=4, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    scheduler = d.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_type="continuous",
        timestep_spacing="leading", use_karras_sigmas=True, interpolation_type="linear", sigma_min=0.002,
        sigma_max=700.0, steps_offset=1,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    return d.StableVideoDiffusionPipeline(
        vae=autoencoder, image_encoder=vision(CLIPVisionModelWithProjection), unet=model, scheduler=scheduler,
        feature_extractor=image_processor(),
    )  # fmt: skip


def wan_transformer(**values: Any) -> d.WanTransformer3DModel:
    """Two layers."""
    given = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
        "out_channels": 16, "text_dim": WIDTH, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32, **values,
    }  # fmt: skip
    return d.WanTransformer3DModel(**given)


def wan_vae() -> d.AutoencoderKLWan:
    """Eight pixels, four frames to one of latents."""
    return d.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan() -> Any:
    """Wan 2.1, text to video."""
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return d.WanPipeline(None, None, wan_vae(), scheduler, transformer=wan_transformer())


def wan_experts() -> Any:
    """Wan 2.2, text to video: one expert for much noise, another one for little."""
    return d.WanPipeline(
        None, None, wan_vae(), flow_unipc(), transformer=wan_transformer(), transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )  # fmt: skip


def wan_image() -> Any:
    """Wan 2.1, image to video."""
    model = wan_transformer(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24)
    return d.WanImageToVideoPipeline(
        None, None, wan_vae(), d.FlowMatchEulerDiscreteScheduler(shift=5.0), image_processor(),
        vision(CLIPVisionModel), model,
    )  # fmt: skip


def cogvideox(scheduler: Any, rotary: bool) -> Any:
    """CogVideoX."""
    model = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=WIDTH, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TOKENS, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=32, sample_width=32,
    )  # fmt: skip
    return d.CogVideoXPipeline(None, None, autoencoder, model, scheduler)


#: Of CogVideoX's schedulers, as in its checkpoints.
COGVIDEOX_NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False,
}  # fmt: skip


def cogvideox_2b() -> Any:
    """CogVideoX 2B: sines and cosines are added for positions."""
    return cogvideox(d.CogVideoXDDIMScheduler(**COGVIDEOX_NOISE, snr_shift_scale=3.0), False)


def cogvideox_5b() -> Any:
    """CogVideoX 5B: rotary embeddings of positions."""
    return cogvideox(d.CogVideoXDPMScheduler(**COGVIDEOX_NOISE, snr_shift_scale=1.0), True)


def skyreels() -> Any:
    """SkyReels V2, text to video."""
    model = d.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, ffn_dim=32, num_layers=2, rope_max_seq_len=32
    )
    return d.SkyReelsV2Pipeline(None, None, model, wan_vae(), flow_unipc(shift=8.0))


ROWS = (
    Row(
        "Stable Video Diffusion",
        stable_video_diffusion,
        {**VIDEO, "image": IMAGE, "num_frames": 3, "max_guidance_scale": 3.0},
        THREE,
        lambda pipe: d.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=False),
    ),
    Row("Wan 2.1", wan, {**PROMPT, **VIDEO, "guidance_scale": 5.0}, repeated(PROMPT), flow_unipc),
    Row(
        "Wan 2.2, two experts",
        wan_experts,
        {**PROMPT, **VIDEO, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
        repeated(PROMPT),
        lambda pipe: d.FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
    Row(
        "Wan 2.1, image to video",
        wan_image,
        {**WAN_IMAGE_PROMPT, **VIDEO, "image": IMAGE, "guidance_scale": 5.0},
        THREE,
        flow_unipc,
    ),
    Row(
        "SkyReels V2",
        skyreels,
        {**PROMPT, **VIDEO, "guidance_scale": 6.0},
        repeated(PROMPT),
        lambda pipe: d.FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
    Row(
        "CogVideoX 2B",
        cogvideox_2b,
        {**PROMPT, **VIDEO, "guidance_scale": 6.0},
        repeated(PROMPT),
        lambda pipe: d.CogVideoXDPMScheduler.from_config(pipe.scheduler.config),
    ),
    Row(
        "CogVideoX 5B",
        cogvideox_5b,
        {**PROMPT, **VIDEO, "guidance_scale": 6.0, "use_dynamic_cfg": True},
        repeated(PROMPT),
        lambda pipe: d.CogVideoXDDIMScheduler.from_config(pipe.scheduler.config),
    ),
)
