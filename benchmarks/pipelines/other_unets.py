"""UNets that are made otherwise than that of Stable Diffusion: of Kandinsky, IF, Stable Cascade and Würstchen."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from .image_unets import IMAGE, PROMPT, WIDTH, dpm_solver, filled, text_encoder, tokenizer, unet
from .row import Row, noise

__all__ = ["ROWS"]

#: Channels of the image embeddings that Stable Cascade and Würstchen have instead of a text's.
EMBEDDING_CHANNELS = 4


def vq_model(channels: int = 8, **values: Any) -> d.VQModel:
    """Images are twice as large as latents."""
    return d.VQModel(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(channels,) * 2, layers_per_block=1,
        norm_num_groups=4, num_vq_embeddings=12, vq_embed_dim=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **values,
    )  # fmt: skip


def simple_unet(**values: Any) -> d.UNet2DConditionModel:
    """The UNet of unCLIP, Kandinsky 2 and IF: residual blocks resample, text is among keys and values of attention."""
    return unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", encoder_hid_dim=WIDTH,
        **values,
    )  # fmt: skip


def kandinsky_2() -> Any:
    """The decoder of Kandinsky 2.2: images of image embeddings; it predicts a variance too."""
    model = simple_unet(out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj")
    scheduler = d.DDPMScheduler(clip_sample=False, variance_type="learned_range")
    return d.KandinskyV22Pipeline(model, scheduler, vq_model(32, norm_type="spatial"))


def kandinsky_3() -> Any:
    """A UNet of its own, with a mask of the prompt."""
    model = d.Kandinsky3UNet(
        time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(16, 32),
        cross_attention_dim=WIDTH, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    return d.Kandinsky3Pipeline(None, None, model, d.DDPMScheduler(clip_sample=False), vq_model())


def deepfloyd() -> Any:
    """Pixels; it predicts a variance too."""
    model = simple_unet(
        in_channels=3, out_channels=6, addition_embed_type="text", addition_embed_type_num_heads=2, act_fn="gelu",
        cross_attention_norm="group_norm",
    )  # fmt: skip
    scheduler = d.DDPMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range")
    return d.IFPipeline(None, None, model, scheduler, None, None, None, requires_safety_checker=False)


def cascade_unet(**values: Any) -> d.StableCascadeUNet:
    """Two levels, attention on the second."""
    plain = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    given = {
        "conditioning_dim": 16, "block_out_channels": (16, 32), "num_attention_heads": (-1, 4),
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": WIDTH,
        "block_types_per_layer": (plain, (*plain, "SDCascadeAttnBlock")), **values,
    }  # fmt: skip
    return filled(d.StableCascadeUNet(**given))


def paella() -> Any:
    """The decoder of Stable Cascade and Würstchen: images are twice as large as latents."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return PaellaVQModel(levels=1, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=12)


def cascade_decoder() -> Any:
    """Latents of image embeddings: patches of two, timesteps from one to zero."""
    model = cascade_unet(
        in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=EMBEDDING_CHANNELS,
        pixel_mapper_in_channels=3, timestep_conditioning_type=("sca",), up_blocks_repeat_mappers=(2, 2),
    )  # fmt: skip
    scheduler = d.DDPMWuerstchenScheduler()
    return d.StableCascadeDecoderPipeline(model, None, None, scheduler, paella(), latent_dim_scale=4.0)


def cascade_prior() -> Any:
    """Image embeddings of text."""
    model = cascade_unet(
        block_out_channels=(32, 32), num_attention_heads=(4, 4), switch_level=(False,), clip_image_in_channels=16,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_in_channels=WIDTH,
    )  # fmt: skip
    return d.StableCascadePriorPipeline(None, text_encoder(projection=True), model, d.DDPMWuerstchenScheduler())


def wuerstchen_decoder() -> Any:
    """Latents of image embeddings and text; its timestep is ``r``."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt

    model = WuerstchenDiffNeXt(
        c_r=16, c_cond=16, c_hidden=[16, 32], nhead=[-1, 4], blocks=[1, 1], level_config=["CT", "CTA"],
        inject_effnet=[False, True], effnet_embd=EMBEDDING_CHANNELS, clip_embd=WIDTH,
    )  # fmt: skip
    return d.WuerstchenDecoderPipeline(
        tokenizer(), text_encoder(), filled(model), d.DDPMWuerstchenScheduler(), paella(), latent_dim_scale=4.0
    )


def wuerstchen_prior() -> Any:
    """Image embeddings of text, without levels; its timestep is ``r``."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    model = WuerstchenPrior(c_in=EMBEDDING_CHANNELS, c=16, c_cond=WIDTH, c_r=16, depth=2, nhead=4)
    return d.WuerstchenPriorPipeline(None, text_encoder(), filled(model), d.DDPMWuerstchenScheduler())


def latent_diffusion() -> Any:
    """Without a condition."""
    model = d.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    return d.LDMPipeline(vq_model(), model, d.DDIMScheduler())


def without_variance(pipe: Any) -> Any:
    """For denoisers that predict a variance, which this scheduler does not take."""
    return d.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)


def scaled(pipe: Any) -> Any:
    """More noise at the same timesteps: these pipelines take one class alone."""
    return d.DDPMWuerstchenScheduler.from_config(pipe.scheduler.config, scaler=2.0)


GUIDED = {**PROMPT, "output_type": "pt", "guidance_scale": 4.0}
#: The last token is padding.
TOKEN_MASK = torch.tensor([[1, 1, 1, 1, 0]])
MASKS = {"attention_mask": TOKEN_MASK, "negative_attention_mask": TOKEN_MASK}
IMAGE_EMBEDS = {"image_embeds": noise(1, WIDTH, seed=9), "negative_image_embeds": noise(1, WIDTH, seed=10)}
CASCADE_POOLED = {
    "prompt_embeds_pooled": noise(1, 1, WIDTH, seed=11),
    "negative_prompt_embeds_pooled": noise(1, 1, WIDTH, seed=12),
}
EMBEDDING = {"image_embeddings": noise(1, EMBEDDING_CHANNELS, 4, 4, seed=13)}
CASCADE_DECODER = {**GUIDED, **CASCADE_POOLED, **EMBEDDING}
THREE_TO_DECODE = {
    name: CASCADE_DECODER[name].repeat(3, *[1] * (CASCADE_DECODER[name].dim() - 1))
    for name in (*PROMPT, *CASCADE_POOLED, *EMBEDDING)
}

ROWS = (
    Row(
        "Kandinsky 2.2", kandinsky_2, {**IMAGE_EMBEDS, **IMAGE, "guidance_scale": 4.0}, other_scheduler=without_variance
    ),
    Row(
        "Kandinsky 3",
        kandinsky_3,
        {**PROMPT, **MASKS, "output_type": "pt", "height": 64, "width": 64, "guidance_scale": 3.0},
        other_scheduler=lambda pipe: d.DDIMScheduler.from_config(pipe.scheduler.config),
    ),
    Row("DeepFloyd IF", deepfloyd, {**PROMPT, **IMAGE, "guidance_scale": 7.0}, other_scheduler=dpm_solver),
    Row("Stable Cascade decoder", cascade_decoder, CASCADE_DECODER, THREE_TO_DECODE, other_scheduler=scaled),
    Row(
        "Stable Cascade prior",
        cascade_prior,
        {**GUIDED, **CASCADE_POOLED, "height": 256, "width": 256},
        other_scheduler=scaled,
    ),
    Row(
        "Würstchen decoder",
        wuerstchen_decoder,
        {**EMBEDDING, "prompt": "a", "negative_prompt": "", "guidance_scale": 4.0, "output_type": "pt"},
        {"image_embeddings": EMBEDDING["image_embeddings"].repeat(3, 1, 1, 1)},
        other_scheduler=scaled,
    ),
    Row("Würstchen prior", wuerstchen_prior, {**GUIDED, "height": 256, "width": 256}, other_scheduler=scaled),
    Row(
        "Latent diffusion, unconditional",
        latent_diffusion,
        {"output_type": "np"},
        {"batch_size": 3},
        other_scheduler=dpm_solver,
    ),
)
