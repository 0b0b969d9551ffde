"""Transformers of latent images that see the text through attention to it, and others of their time."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from .image_transformers import (
    GUIDANCE,
    IMAGE,
    MASKS,
    PROMPT,
    SHIFTED,
    TEXTS,
    TOKENS,
    WIDTH,
    autoencoder,
    heun,
    shifted,
    thrice,
)
from .image_unets import filled
from .row import Row, noise

__all__ = ["ROWS"]

#: For pipelines whose latents have an eighth of the sides of an image.
EIGHTFOLD = {"levels": 4}
LARGER = {"output_type": "pt", "height": 64, "width": 64}
#: The second text of HunyuanDiT, of another length.
TOKENS_2 = 7


def euler(pipe: Any) -> Any:
    """Euler's method for a scheduler of diffusion."""
    return d.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def pixart_transformer(size: int, *, sizes: bool) -> d.PixArtTransformer2DModel:
    """The transformer of both; ``sizes`` are embedded in the larger models of PixArt-alpha."""
    return d.PixArtTransformer2DModel(
        sample_size=size, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        caption_channels=WIDTH, cross_attention_dim=24, out_channels=8, use_additional_conditions=sizes,
    )  # fmt: skip


def pixart_alpha() -> Any:
    """PixArt-alpha of 1024 pixels: with the size and the shape of the image."""
    model = pixart_transformer(128, sizes=True)
    return d.PixArtAlphaPipeline(None, None, autoencoder(), model, d.DPMSolverMultistepScheduler())


def pixart_sigma() -> Any:
    """PixArt-sigma."""
    model = pixart_transformer(8, sizes=False)
    return d.PixArtSigmaPipeline(None, None, autoencoder(), model, d.DPMSolverMultistepScheduler())


def sana() -> Any:
    """Sana: linear attention, and an autoencoder of its own."""
    model = d.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=32,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
    )  # fmt: skip
    blocks = ("ResBlock", "EfficientViTBlock")
    decoder = d.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate", downsample_block_type="conv", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return d.SanaPipeline(None, None, decoder, model, scheduler)


def hunyuan() -> Any:
    """HunyuanDiT: two texts of fixed lengths."""
    model = d.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2, in_channels=4,
        hidden_size=32, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16,
        text_len=TOKENS, text_len_t5=TOKENS_2,
    )  # fmt: skip
    return d.HunyuanDiTPipeline(
        vae=autoencoder(**EIGHTFOLD), text_encoder=None, tokenizer=None, transformer=model, scheduler=d.DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def cogview3() -> Any:
    """CogView3-Plus."""
    model = d.CogView3PlusTransformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=WIDTH,
        time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    scheduler = d.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return d.CogView3PlusPipeline(None, None, autoencoder(), model, scheduler)


def cogview4() -> Any:
    """CogView4: one call for the prompt and one for the empty prompt."""
    model = d.CogView4Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=WIDTH,
        time_embed_dim=16, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    return d.CogView4Pipeline(None, None, autoencoder(), model, scheduler)


def aura_flow() -> Any:
    """AuraFlow."""
    model = d.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return d.AuraFlowPipeline(None, None, autoencoder(), model, d.FlowMatchEulerDiscreteScheduler(shift=1.73))


def lumina() -> Any:
    """Lumina-Next."""
    model = d.LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=WIDTH,
    )  # fmt: skip
    for layer in model.layers:  # It starts with a gate that lets no text through.
        torch.nn.init.normal_(layer.gate)
    return d.LuminaPipeline(model, d.FlowMatchEulerDiscreteScheduler(), autoencoder(**EIGHTFOLD), None, None)


def lumina_2() -> Any:
    """Lumina-Image 2: text and image in one sequence."""
    model = d.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), cap_feat_dim=WIDTH,
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return d.Lumina2Pipeline(model, scheduler, autoencoder(**EIGHTFOLD, **SHIFTED), None, None)


def hidream() -> Any:
    """HiDream-I1: experts for each token; patches of 8 for the latents of 128 x 128 that the pipeline always makes."""
    model = d.HiDreamImageTransformer2DModel(
        patch_size=8, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[WIDTH, 16], text_emb_dim=WIDTH, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(128, 128), llama_layers=(0, 1),
    )  # fmt: skip
    decoder = autoencoder(levels=1, **SHIFTED)
    texts = {**TEXTS, **dict.fromkeys(("text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4"))}
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return d.HiDreamImagePipeline(scheduler, decoder, transformer=model, **texts)


def prx() -> Any:
    """PRX: the text has keys and values alone."""
    model = d.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=WIDTH, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return d.PRXPipeline(filled(model), scheduler, None, None, autoencoder(**SHIFTED))


NO_BINS = {"use_resolution_binning": False}
PIXART = {**PROMPT, **MASKS, **IMAGE, **GUIDANCE, **NO_BINS, "negative_prompt": None}
LUMINA = {**PROMPT, **MASKS, **LARGER, **GUIDANCE}
HUNYUAN = {
    **PROMPT, **MASKS, "prompt_embeds_2": noise(1, TOKENS_2, WIDTH), "prompt_attention_mask_2": torch.ones(1, TOKENS_2),
    "negative_prompt_embeds_2": noise(1, TOKENS_2, WIDTH, seed=8),
    "negative_prompt_attention_mask_2": torch.ones(1, TOKENS_2),
}  # fmt: skip
HIDREAM = {
    "prompt_embeds_t5": noise(1, TOKENS, WIDTH), "prompt_embeds_llama3": noise(2, 1, TOKENS, 16),
    "negative_prompt_embeds_t5": noise(1, TOKENS, WIDTH, seed=8),
    "negative_prompt_embeds_llama3": noise(2, 1, TOKENS, 16, seed=8),
    "pooled_prompt_embeds": noise(1, WIDTH, seed=9), "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=10),
}  # fmt: skip

ROWS = (
    Row("PixArt-alpha", pixart_alpha, PIXART, other_scheduler=euler),
    Row("PixArt-sigma", pixart_sigma, PIXART, other_scheduler=euler),
    Row(
        "Sana",
        sana,
        {
            **PROMPT,
            **MASKS,
            **GUIDANCE,
            **NO_BINS,
            "negative_prompt": None,
            "output_type": "pt",
            "height": 32,
            "width": 32,
        },
        other_scheduler=lambda _pipe: d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    Row("HunyuanDiT", hunyuan, {**HUNYUAN, **LARGER, **GUIDANCE, **NO_BINS}, thrice(HUNYUAN), euler),
    Row(
        "CogView3-Plus",
        cogview3,
        {**PROMPT, **IMAGE, **GUIDANCE},
        thrice(PROMPT),
        lambda pipe: d.CogVideoXDPMScheduler.from_config(pipe.scheduler.config),
    ),
    Row("CogView4", cogview4, {**PROMPT, **IMAGE, **GUIDANCE}, thrice(PROMPT), shifted),
    Row("AuraFlow", aura_flow, {**PROMPT, **MASKS, **IMAGE, **GUIDANCE}, other_scheduler=heun),
    Row("Lumina-Next", lumina, LUMINA, thrice({**PROMPT, **MASKS}), heun),
    Row("Lumina-Image 2", lumina_2, LUMINA, thrice({**PROMPT, **MASKS}), shifted),
    Row("HiDream-I1", hidream, {**HIDREAM, **GUIDANCE, "output_type": "pt"}, other_scheduler=shifted),
    Row(
        "PRX",
        prx,
        {**PROMPT, **MASKS, **IMAGE, **GUIDANCE, **NO_BINS},
        # With guidance it gives two timesteps to any number of images: it admits one image.
        {**thrice({**PROMPT, **MASKS}), "guidance_scale": 1.0},
        heun,
    ),
)
