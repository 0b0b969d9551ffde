"""Transformers of latent images with text and image in one sequence: Stable Diffusion 3, Flux and their relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers as d
import torch

from .row import Row, noise

__all__ = ["ROWS"]

#: Of prompt embeddings.
TOKENS, WIDTH = 5, 32
PROMPT = {"prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=8)}
POOLED = {"pooled_prompt_embeds": noise(1, WIDTH, seed=9), "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=10)}
MASKS = {
    "prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
    "negative_prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool),
}
IMAGE = {"output_type": "pt", "height": 16, "width": 16}
GUIDANCE = {"guidance_scale": 5.0}
#: An image to start from, with values in [0, 1].
GIVEN_IMAGE = {"image": noise(1, 3, 16, 16, seed=11).sigmoid()}

#: Of autoencoders of flow matching models.
SHIFTED = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5035}
#: Of the scheduler of Flux.
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
#: The text models of Flux.
TEXTS = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def autoencoder(channels: int = 4, levels: int = 2, **values: Any) -> d.AutoencoderKL:
    """Each level more than one halves the sides of latents."""
    return d.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8,) * levels, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **values,
    )  # fmt: skip


def thrice(arguments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same embeddings for three images, for pipelines that do not repeat what they are given."""
    return {name: torch.cat([value] * 3) for name, value in arguments.items()}


def shifted(pipe: Any) -> Any:
    """Euler's method with another constant shift."""
    return d.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=1.5, use_dynamic_shifting=False)


def karras(pipe: Any) -> Any:
    """Euler's method at other noise levels."""
    return d.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)


def heun(pipe: Any) -> Any:
    """Heun's method, with two calls a step."""
    return d.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)


def unipc(_pipe: Any) -> Any:
    """A multistep method of flow matching."""
    return d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, use_dynamic_shifting=True
    )


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3, without the attention over the image alone of 3.5."""
    model = d.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
    )  # fmt: skip
    texts = {**TEXTS, "text_encoder_3": None, "tokenizer_3": None}
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return d.StableDiffusion3Pipeline(model, scheduler, autoencoder(**SHIFTED), **texts)


def flux_transformer(**values: Any) -> d.FluxTransformer2DModel:
    """One block of two streams and one of a single stream."""
    return d.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), **values,
    )  # fmt: skip


def flux() -> Any:
    """Flux.1 schnell: without a guidance embedding."""
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return d.FluxPipeline(scheduler, autoencoder(1, **SHIFTED), transformer=flux_transformer(), **TEXTS)


def flux_dev() -> Any:
    """Flux.1 dev: the guidance scale is embedded."""
    model = flux_transformer(guidance_embeds=True)
    scheduler = d.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return d.FluxPipeline(scheduler, autoencoder(1, **SHIFTED), transformer=model, **TEXTS)


def flux_image_to_image() -> Any:
    """Flux.1 dev, from an image."""
    model = flux_transformer(guidance_embeds=True)
    scheduler = d.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return d.FluxImg2ImgPipeline(scheduler, autoencoder(1, **SHIFTED), transformer=model, **TEXTS)


def flux_kontext() -> Any:
    """Flux.1 Kontext: the tokens of another image follow those of the image."""
    model = flux_transformer(guidance_embeds=True)
    scheduler = d.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return d.FluxKontextPipeline(scheduler, autoencoder(1, **SHIFTED), transformer=model, **TEXTS)


def flux_2_parts(*, guidance: bool) -> dict[str, Any]:
    """What the pipelines of Flux.2 are made of."""
    model = d.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    decoder = d.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=1, norm_num_groups=4, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return {"scheduler": scheduler, "vae": decoder, "text_encoder": None, "tokenizer": None, "transformer": model}


def flux_2() -> Any:
    """Flux.2 dev: the guidance scale is embedded."""
    return d.Flux2Pipeline(**flux_2_parts(guidance=True))


def flux_2_klein() -> Any:
    """Flux.2 Klein before distillation: with a call for the empty prompt."""
    return d.Flux2KleinPipeline(**flux_2_parts(guidance=False))


def chroma() -> Any:
    """Chroma: Flux with one small network for all modulations, and masked tokens."""
    model = d.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return d.ChromaPipeline(scheduler, autoencoder(1, **SHIFTED), None, None, model)


def bria() -> Any:
    """Bria 3: Flux without a pooled embedding."""
    model = d.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return d.BriaPipeline(model, scheduler, autoencoder(shift_factor=0.0), None, None)


def qwen_image() -> Any:
    """Qwen-Image."""
    model = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    decoder = d.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    return d.QwenImagePipeline(d.FlowMatchEulerDiscreteScheduler(**DYNAMIC), decoder, None, None, model)


def z_image() -> Any:
    """Z-Image: lists of images and prompts, each of its own length."""
    model = d.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # It leaves them as the memory was.
        model.x_pad_token.normal_()
        model.cap_pad_token.normal_()
    return d.ZImagePipeline(d.FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(**SHIFTED), None, None, model)


FLUX = {"prompt_embeds": PROMPT["prompt_embeds"], "pooled_prompt_embeds": POOLED["pooled_prompt_embeds"]}
QWEN_MASKS = {
    "prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.int64),
    "negative_prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.int64),
}

ROWS = (
    Row(
        "Stable Diffusion 3",
        stable_diffusion_3,
        {**PROMPT, **POOLED, **IMAGE, **GUIDANCE},
        thrice({**PROMPT, **POOLED}),
        heun,
    ),
    Row("Flux.1 schnell", flux, {**FLUX, **IMAGE, "guidance_scale": 0.0}, thrice(FLUX), shifted),
    Row("Flux.1 dev", flux_dev, {**FLUX, **IMAGE, "guidance_scale": 3.5}, thrice(FLUX), unipc),
    Row(
        "Flux.1 dev, from an image",
        flux_image_to_image,
        {**FLUX, **IMAGE, **GIVEN_IMAGE, "guidance_scale": 3.5, "strength": 0.7},
        thrice(FLUX),
        shifted,
    ),
    Row(
        "Flux.1 Kontext",
        flux_kontext,
        {**FLUX, **IMAGE, **GIVEN_IMAGE, "guidance_scale": 2.5, "max_area": 256, "_auto_resize": False},
        thrice(FLUX),
        karras,
    ),
    Row(
        "Flux.2 dev",
        flux_2,
        {"prompt_embeds": PROMPT["prompt_embeds"], **IMAGE, "guidance_scale": 4.0},
        other_scheduler=shifted,
    ),
    Row("Flux.2 Klein", flux_2_klein, {**PROMPT, **IMAGE, "guidance_scale": 4.0}, other_scheduler=karras),
    Row("Chroma", chroma, {**PROMPT, **MASKS, **IMAGE, **GUIDANCE}, thrice({**PROMPT, **MASKS}), shifted),
    Row("Bria 3", bria, {**PROMPT, **IMAGE, **GUIDANCE}, thrice(PROMPT), shifted),
    Row("Qwen-Image", qwen_image, {**PROMPT, **QWEN_MASKS, **IMAGE, "true_cfg_scale": 4.0}, other_scheduler=unipc),
    Row(
        "Z-Image",
        z_image,
        {**{name: [value[0]] for name, value in PROMPT.items()}, **IMAGE, **GUIDANCE},
        other_scheduler=shifted,
    ),
)
