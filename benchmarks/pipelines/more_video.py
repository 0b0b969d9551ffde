"""More pipelines of videos: Allegro, Latte, SANA-Video, ModelScope, I2VGenXL, EasyAnimate, Cosmos, SkyReels and others."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import CLIPVisionModelWithProjection

from .image_unets import autoencoder
from .row import Row, noise
from .video import (
    IMAGE,
    MASKS,
    PROMPT,
    THREE,
    TOKENS,
    VIDEO,
    WIDTH,
    flow_unipc,
    hunyuan_vae,
    image_processor,
    longer_shift,
    repeated,
    trained,
    vision,
    wan_vae,
)

__all__ = ["ROWS"]


class Unchecked(d.ModelMixin, d.ConfigMixin):
    """In place of Cosmos' safety checker, which has to be downloaded: it lets everything pass."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_position", torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        """Whether a prompt may be used."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """The frames that may be shown."""
        return frames


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


def sana_video() -> Any:
    """SANA-Video: linear attention."""
    model = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH,
        mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return d.SanaVideoPipeline(None, None, wan_vae(), model, d.FlowMatchEulerDiscreteScheduler(shift=7.0))


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


def skyreels() -> Any:
    """SkyReels V2, text to video."""
    model = d.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, ffn_dim=32, num_layers=2, rope_max_seq_len=32
    )
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return d.SkyReelsV2Pipeline(None, None, model, wan_vae(), scheduler)


def ltx2() -> Any:
    """LTX-2: video and sound."""
    model = d.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=WIDTH, rope_type="split",
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=2, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8, video_connector_num_layers=1, video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_type="split",
    )  # fmt: skip
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), down_block_types=("LTX2VideoDownBlock3D",), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",), upsample_residual=(False,), upsample_factor=(1,), patch_size=1,
    )  # fmt: skip
    audio_vae = d.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    return d.LTX2Pipeline(scheduler, vae, audio_vae, None, None, connectors, model, vocoder)


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


def kandinsky_5() -> Any:
    """Kandinsky 5, text to video."""
    model = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=8, time_dim=32, model_dim=48, ff_dim=128,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 8, 8),
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return d.Kandinsky5T2VPipeline(trained(model), hunyuan_vae(), None, None, None, None, scheduler)


#: LTX-2 is given the states of all layers of its text encoder.
LTX2_PROMPT = {
    "prompt_embeds": noise(1, TOKENS, 2 * WIDTH), "negative_prompt_embeds": noise(1, TOKENS, 2 * WIDTH, seed=8),
}  # fmt: skip
HUNYUAN_15_PROMPT = {
    **PROMPT, "prompt_embeds_mask": torch.ones(1, TOKENS), "negative_prompt_embeds_mask": torch.ones(1, TOKENS),
    "prompt_embeds_2": noise(1, TOKENS, 8, seed=9), "prompt_embeds_mask_2": torch.ones(1, TOKENS),
    "negative_prompt_embeds_2": noise(1, TOKENS, 8, seed=10), "negative_prompt_embeds_mask_2": torch.ones(1, TOKENS),
}  # fmt: skip
KANDINSKY_5_PROMPT = {
    "prompt_embeds_qwen": noise(1, TOKENS, WIDTH), "prompt_embeds_clip": noise(1, 8, seed=9),
    "negative_prompt_embeds_qwen": noise(1, TOKENS, WIDTH, seed=8),
    "negative_prompt_embeds_clip": noise(1, 8, seed=10),
}  # fmt: skip
KANDINSKY_5_LENGTHS = {
    "prompt_cu_seqlens": torch.tensor([0, TOKENS]), "negative_prompt_cu_seqlens": torch.tensor([0, TOKENS]),
}  # fmt: skip
SIZE = {"output_type": "pt", "height": 16, "width": 16}


def other_terminal(pipe: Any) -> Any:
    """Euler steps that end at another noise level."""
    return d.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=0.02)


ROWS = (
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
        {
            **PROMPT, **MASKS, "output_type": "pt", "height": 32, "width": 32, "frames": 9, "negative_prompt": None,
            "use_resolution_binning": False, "guidance_scale": 6.0,
        },
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
    Row(
        "Cosmos 1.0",
        cosmos,
        {**PROMPT, **VIDEO, "guidance_scale": 7.0},
        THREE,
        lambda pipe: d.EDMEulerScheduler.from_config(pipe.scheduler.config, sigma_schedule="exponential"),
    ),
    Row(
        "SkyReels V2",
        skyreels,
        {**PROMPT, **VIDEO, "guidance_scale": 6.0},
        THREE,
        lambda pipe: d.FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
    Row(
        "LTX-2",
        ltx2,
        {**LTX2_PROMPT, **MASKS, **VIDEO, "guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0,
         "audio_stg_scale": 0.0, "audio_modality_scale": 1.0},
        repeated(LTX2_PROMPT, MASKS),
        other_terminal,
    ),
    Row(
        "LTX-2, guidance by other passes",
        ltx2,
        {**LTX2_PROMPT, **MASKS, **VIDEO, "guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0,
         "spatio_temporal_guidance_blocks": [1]},
        repeated(LTX2_PROMPT, MASKS),
        other_terminal,
    ),
    Row(
        "HunyuanVideo 1.5",
        hunyuan_video_15,
        {**HUNYUAN_15_PROMPT, **SIZE, "num_frames": 9},
        repeated(HUNYUAN_15_PROMPT),
        longer_shift,
    ),
    Row(
        "Kandinsky 5",
        kandinsky_5,
        {**KANDINSKY_5_PROMPT, **KANDINSKY_5_LENGTHS, **VIDEO, "guidance_scale": 5.0},
        THREE,
        longer_shift,
    ),
)  # fmt: skip
