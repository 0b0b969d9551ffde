"""UNets of latent images: Stable Diffusion and its relatives."""

from __future__ import annotations

from typing import Any

import diffusers as d

from .row import Row, noise

__all__ = ["ROWS"]

#: Of prompt embeddings.
TOKENS, WIDTH = 5, 32


def autoencoder(channels: int = 4, **values: Any) -> d.AutoencoderKL:
    """One level more than none: images are twice as large as latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    given = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, **values}
    return d.AutoencoderKL(in_channels=3, out_channels=3, latent_channels=channels, **blocks, **given)


def unet(**values: Any) -> d.UNet2DConditionModel:
    """Two levels, attention on both."""
    given = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
        "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH, "attention_head_dim": 8,
        **values,
    }  # fmt: skip
    return d.UNet2DConditionModel(**given)


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5."""
    return d.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet(), scheduler=d.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


PROMPT = {"prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=8)}
IMAGE = {"output_type": "pt", "height": 16, "width": 16}

ROWS = (
    Row(
        "Stable Diffusion 1.5",
        stable_diffusion,
        {**PROMPT, **IMAGE, "guidance_scale": 5.0},
        other_scheduler=lambda pipe: d.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True),
    ),
)
