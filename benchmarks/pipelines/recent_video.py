"""Text to video: LTX, HunyuanVideo, Cosmos, Kandinsky."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from .row import Row, noise
from .video import MASKS, PROMPT, SIZE, THREE, TOKENS, VIDEO, WIDTH, longer_shift, repeated, trained

__all__ = ["ROWS"]


class Unchecked(d.ModelMixin, d.ConfigMixin):
    """In place of Cosmos' safety checker, which has to be downloaded: it lets everything pass."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        """Whether a prompt may be used."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """The frames that may be shown."""
        return frames


def cosmos() -> Any:
    """Cosmos 1.0, text to world; without the padding mask, which it resizes by torchvision."""
    model = d.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
    )  # fmt: skip
    vae = d.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=2, patch_size=4, patch_type="haar",
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = d.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon", rho=7.0,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    return d.CosmosTextToWorldPipeline(None, None, trained(model), vae, scheduler, Unchecked())


def ltx_scheduler() -> d.FlowMatchEulerDiscreteScheduler:
    """Of all LTX models: the more tokens, the longer it stays at much noise."""
    return d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip


def ltx() -> Any:
    """LTX-Video."""
    model = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    autoencoder = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return d.LTXPipeline(ltx_scheduler(), autoencoder, None, None, model)


def ltx2() -> Any:
    """LTX-2: video and sound."""
    model = d.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=WIDTH, rope_type="split",
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=2, connector_rope_base_seq_len=32, rope_type="split",
        video_connector_num_attention_heads=4, video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), down_block_types=("LTX2VideoDownBlock3D",), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1,
    )  # fmt: skip
    audio_vae = d.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return d.LTX2Pipeline(ltx_scheduler(), vae, audio_vae, None, None, connectors, model, vocoder)


#: LTX-2 is given the states of all layers of its text encoder.
LTX2_PROMPT = {
    "prompt_embeds": noise(1, TOKENS, 2 * WIDTH), "negative_prompt_embeds": noise(1, TOKENS, 2 * WIDTH, seed=8),
}  # fmt: skip


def other_terminal(pipe: Any) -> Any:
    """Euler steps that end at another noise level."""
    return d.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=0.02)


def hunyuan_vae() -> d.AutoencoderKLHunyuanVideo:
    """Eight pixels, four frames to one of latents."""
    return d.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def hunyuan_video() -> Any:
    """HunyuanVideo: guidance is an input."""
    model = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=WIDTH, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return d.HunyuanVideoPipeline(None, None, model, hunyuan_vae(), scheduler, None, None)


def hunyuan_video_15() -> Any:
    """HunyuanVideo 1.5, text to video."""
    model = d.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=WIDTH, text_embed_2_dim=8, image_embed_dim=12, rope_axes_dim=(2, 2, 4),
        target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    # It decodes more than one video only one after the other.
    vae.enable_slicing()
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=5.0)
    guider = d.ClassifierFreeGuidance(guidance_scale=6.0)
    return d.HunyuanVideo15Pipeline(None, None, model, vae, scheduler, None, None, guider)


#: Guidance by the negative prompt only.
LTX2_TEXT_ONLY = {
    "guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": 7.0,
    "audio_stg_scale": 0.0, "audio_modality_scale": 1.0,
}  # fmt: skip
#: Its defaults: guidance by passes without some attention, and by passes with video and sound apart, too.
LTX2_ALL = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [1]}
HUNYUAN_PROMPT = {
    "prompt_embeds": PROMPT["prompt_embeds"], "prompt_attention_mask": MASKS["prompt_attention_mask"],
    "pooled_prompt_embeds": noise(1, 8, seed=9),
}  # fmt: skip
HUNYUAN_15_PROMPT = {
    **PROMPT, "prompt_embeds_mask": torch.ones(1, TOKENS), "negative_prompt_embeds_mask": torch.ones(1, TOKENS),
    "prompt_embeds_2": noise(1, TOKENS, 8, seed=9), "prompt_embeds_mask_2": torch.ones(1, TOKENS),
    "negative_prompt_embeds_2": noise(1, TOKENS, 8, seed=10), "negative_prompt_embeds_mask_2": torch.ones(1, TOKENS),
}  # fmt: skip


def kandinsky_5() -> Any:
    """Kandinsky 5, text to video."""
    model = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=8, time_dim=32, model_dim=48, ff_dim=128,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 8, 8),
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return d.Kandinsky5T2VPipeline(trained(model), hunyuan_vae(), None, None, None, None, scheduler)


KANDINSKY_5_PROMPT = {
    "prompt_embeds_qwen": noise(1, TOKENS, WIDTH), "prompt_embeds_clip": noise(1, 8, seed=9),
    "negative_prompt_embeds_qwen": noise(1, TOKENS, WIDTH, seed=8),
    "negative_prompt_embeds_clip": noise(1, 8, seed=10),
}  # fmt: skip
KANDINSKY_5_LENGTHS = {
    "prompt_cu_seqlens": torch.tensor([0, TOKENS]), "negative_prompt_cu_seqlens": torch.tensor([0, TOKENS]),
}  # fmt: skip

ROWS = (
    Row(
        "LTX-Video",
        ltx,
        {**PROMPT, **MASKS, **VIDEO, "guidance_scale": 3.0},
        repeated(PROMPT, MASKS),
        other_terminal,
    ),
    Row(
        "LTX-2",
        ltx2,
        {**LTX2_PROMPT, **MASKS, **VIDEO, **LTX2_TEXT_ONLY},
        repeated(LTX2_PROMPT, MASKS),
        other_terminal,
    ),
    Row(
        "LTX-2, guidance by other passes",
        ltx2,
        {**LTX2_PROMPT, **MASKS, **VIDEO, **LTX2_ALL},
        repeated(LTX2_PROMPT, MASKS),
        other_terminal,
    ),
    Row(
        "HunyuanVideo",
        hunyuan_video,
        {**HUNYUAN_PROMPT, **VIDEO, "guidance_scale": 6.0},
        THREE,
        longer_shift,
    ),
    Row(
        "HunyuanVideo 1.5",
        hunyuan_video_15,
        {**HUNYUAN_15_PROMPT, **SIZE, "num_frames": 9},
        repeated(HUNYUAN_15_PROMPT),
        longer_shift,
    ),
    Row(
        "Cosmos 1.0",
        cosmos,
        {**PROMPT, **VIDEO, "guidance_scale": 7.0},
        THREE,
        lambda pipe: d.EDMEulerScheduler.from_config(pipe.scheduler.config, sigma_schedule="exponential"),
    ),
    Row(
        "Kandinsky 5",
        kandinsky_5,
        {**KANDINSKY_5_PROMPT, **KANDINSKY_5_LENGTHS, **VIDEO, "guidance_scale": 5.0},
        THREE,
        longer_shift,
    ),
)
