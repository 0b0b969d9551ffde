"""UNets of latent images that are also told sizes and a pooled prompt: SDXL and Kolors."""

from __future__ import annotations

from typing import Any

import diffusers as d
from diffusers.utils import is_sentencepiece_available

from .image_unets import IMAGE, PICTURE, PROMPT, PROMPTS, WIDTH, autoencoder, controlnet, dpm_solver, euler_karras, unet
from .row import Row, noise

__all__ = ["ROWS"]

#: Of a call: two sizes and a position of two numbers each, and of every number an embedding; of the pooled prompt.
SIZES, SIZE_WIDTH, POOLED_WIDTH = 6, 8, 24

SIZE_EMBEDDINGS = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + SIZES * SIZE_WIDTH,
    "use_linear_projection": True,
}
TEXTS = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def sdxl_unet(**values: Any) -> d.UNet2DConditionModel:
    """Attention on the second level alone, two layers deep."""
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), **SIZE_EMBEDDINGS, **values,
    )  # fmt: skip


def _parts(**values: Any) -> dict[str, Any]:
    """What pipelines of SDXL are made of."""
    return {
        "vae": autoencoder(force_upcast=False), "unet": sdxl_unet(), "scheduler": d.EulerDiscreteScheduler(),
        "add_watermarker": False, **TEXTS, **values,
    }  # fmt: skip


def sdxl() -> Any:
    """Stable Diffusion XL."""
    return d.StableDiffusionXLPipeline(**_parts())


def image_to_image() -> Any:
    """The UNet of SDXL, from a noised image."""
    return d.StableDiffusionXLImg2ImgPipeline(**_parts())


def control() -> Any:
    """Residuals of a ControlNet are inputs of the UNet."""
    model = controlnet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2), **SIZE_EMBEDDINGS
    )
    return d.StableDiffusionXLControlNetPipeline(**_parts(controlnet=model))


def kolors() -> Any:
    """The UNet of SDXL with the text embeddings of a language model, projected."""
    model = sdxl_unet(encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj", cross_attention_dim=16)
    return d.KolorsPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=model, scheduler=d.EulerDiscreteScheduler()
    )


POOLED = {
    "pooled_prompt_embeds": noise(1, POOLED_WIDTH, seed=9),
    "negative_pooled_prompt_embeds": noise(1, POOLED_WIDTH, seed=10),
}
GUIDED = {**PROMPT, **POOLED, **IMAGE, "guidance_scale": 5.0}
#: Three prompts: Kolors does not make more than one image of an embedding.
THREE = {**PROMPTS, **{name: value.repeat(3, 1) for name, value in POOLED.items()}}
EDIT = {**PROMPT, **POOLED, "output_type": "pt", "guidance_scale": 5.0, "image": PICTURE, "strength": 0.8}

ROWS = (
    Row("Stable Diffusion XL", sdxl, GUIDED, other_scheduler=dpm_solver),
    Row("Stable Diffusion XL image to image", image_to_image, EDIT, other_scheduler=euler_karras),
    Row("Stable Diffusion XL ControlNet", control, {**GUIDED, "image": PICTURE}, other_scheduler=dpm_solver),
)
if is_sentencepiece_available():  # diffusers has a class without it that only says so
    ROWS = (*ROWS, Row("Kolors", kolors, GUIDED, THREE, other_scheduler=euler_karras))
