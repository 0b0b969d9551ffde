"""UNets of latent images: Stable Diffusion and its relatives."""

from __future__ import annotations

from typing import Any

import diffusers as d
from torch import nn

from .row import Row, noise

__all__ = [
    "EDIT",
    "GUIDED",
    "IMAGE",
    "PICTURE",
    "PROMPT",
    "PROMPTS",
    "ROWS",
    "TOKENS",
    "WIDTH",
    "autoencoder",
    "controlnet",
    "dpm_solver",
    "euler_karras",
    "filled",
    "text_encoder",
    "tokenizer",
    "unet",
]

#: Of prompt embeddings.
TOKENS, WIDTH = 5, 32


def autoencoder(channels: int = 4, **values: Any) -> d.AutoencoderKL:
    """One level more than none: images are twice as large as latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    given = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "norm_num_groups": 4,
        "layers_per_block": 1, **values,
    }  # fmt: skip
    return d.AutoencoderKL(latent_channels=channels, **blocks, **given)


def unet(**values: Any) -> d.UNet2DConditionModel:
    """Two levels, attention on both."""
    given = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
        "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH, "attention_head_dim": 8,
        **values,
    }  # fmt: skip
    return d.UNet2DConditionModel(**given)


def controlnet(**values: Any) -> d.ControlNetModel:
    """As the down half of ``unet``; its conditioning image is twice as large as latents."""
    given = {
        "in_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH,
        "attention_head_dim": 8, "conditioning_embedding_out_channels": (8, 16), **values,
    }  # fmt: skip
    return filled(d.ControlNetModel(**given))


def filled(model: nn.Module) -> nn.Module:
    """Random numbers in place of weights that start as zeros: what is before them would have no effect."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def text_encoder(projection: bool = False) -> Any:
    """For pipelines that ask it for its type."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=16, num_attention_heads=4, num_hidden_layers=1, vocab_size=4,
        projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tokenizer() -> Any:
    """For pipelines that encode a text of their own: it knows one letter."""
    from transformers import CLIPTokenizer

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def euler_karras(pipe: Any) -> Any:
    """Other sigmas: timesteps are not whole numbers."""
    return d.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)


def dpm_solver(pipe: Any) -> Any:
    """DPM-Solver++ of second order."""
    return d.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def _parts(**values: Any) -> dict[str, Any]:
    """What pipelines of Stable Diffusion 1.5 are made of."""
    return {
        "vae": autoencoder(), "text_encoder": None, "tokenizer": None, "unet": unet(), "scheduler": d.DDIMScheduler(),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **values,
    }  # fmt: skip


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5."""
    return d.StableDiffusionPipeline(**_parts())


def inpaint() -> Any:
    """Nine channels: latents, mask and latents of what is not masked."""
    return d.StableDiffusionInpaintPipeline(**_parts(unet=unet(in_channels=9)))


def image_to_image() -> Any:
    """The UNet of Stable Diffusion 1.5, from a noised image."""
    return d.StableDiffusionImg2ImgPipeline(**_parts())


def control() -> Any:
    """Residuals of a ControlNet are inputs of the UNet."""
    return d.StableDiffusionControlNetPipeline(**_parts(controlnet=controlnet()))


def latent_consistency() -> Any:
    """Guidance is an embedding beside that of the timestep."""
    model = unet(time_cond_proj_dim=16)
    return d.LatentConsistencyModelPipeline(**_parts(unet=model, scheduler=d.LCMScheduler()))


def instruct_pix2pix() -> Any:
    """Eight channels, and guidance by text and image: three samples a call."""
    return d.StableDiffusionInstructPix2PixPipeline(**_parts(unet=unet(in_channels=8)))


PROMPT = {"prompt_embeds": noise(1, TOKENS, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=8)}
IMAGE = {"output_type": "pt", "height": 16, "width": 16}
#: Of a call with prompts and guidance.
GUIDED = {**PROMPT, **IMAGE, "guidance_scale": 5.0}
#: The same of one that takes its size from an image.
PICTURE = noise(1, 3, 16, 16, seed=11).sigmoid()
EDIT = {**PROMPT, "output_type": "pt", "guidance_scale": 5.0, "image": PICTURE}
MASK = (noise(1, 1, 16, 16, seed=12) > 0).float()
#: Three prompts, for pipelines that cannot be told to make three images of one.
PROMPTS = {name: value.repeat(3, 1, 1) for name, value in PROMPT.items()}

ROWS = (
    Row("Stable Diffusion 1.5", stable_diffusion, GUIDED, other_scheduler=euler_karras),
    Row(
        "Stable Diffusion inpainting",
        inpaint,
        {**GUIDED, "image": PICTURE, "mask_image": MASK},
        other_scheduler=dpm_solver,
    ),
    Row(
        "Stable Diffusion image to image",
        image_to_image,
        {**EDIT, "strength": 0.8},
        other_scheduler=euler_karras,
    ),
    Row("Stable Diffusion ControlNet", control, {**GUIDED, "image": PICTURE}, other_scheduler=dpm_solver),
    Row(
        "Latent Consistency Model",
        latent_consistency,
        {"prompt_embeds": PROMPT["prompt_embeds"], **IMAGE, "guidance_scale": 5.0},
        other_scheduler=lambda pipe: d.LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=20),
    ),
    Row(
        "InstructPix2Pix",
        instruct_pix2pix,
        {**EDIT, "image_guidance_scale": 1.5},
        other_scheduler=lambda pipe: d.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config),
    ),
)
