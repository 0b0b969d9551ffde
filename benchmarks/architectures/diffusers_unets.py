"""The UNets of diffusers, narrow: the layers of the real configurations, few channels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel

from .example import Example, Factory, normal

__all__ = ["UNETS"]

TIMES = torch.tensor([100, 700])


def _unet2d(**changes: Any) -> Example:
    options = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        **changes,
    }
    inputs: dict[str, Any] = {"sample": normal(2, 3, 16, 16), "timestep": TIMES}
    if "class_embed_type" in changes or "num_class_embeds" in changes:
        inputs["class_labels"] = torch.tensor([1, 7])
    if changes.get("time_embedding_type") == "fourier":
        times = torch.linspace(-3, 3, 10).exp().flip(0)
        return Example(UNet2DModel(**options).eval(), {**inputs, "timestep": times[[2, 7]]}, timesteps=times)
    return Example(UNet2DModel(**options).eval(), inputs)


def _condition(sample_channels: int = 4, **changes: Any) -> Example:
    options = {
        "sample_size": 8,
        "in_channels": sample_channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        **changes,
    }
    inputs = {"sample": normal(2, sample_channels, 8, 8), "timestep": TIMES, "encoder_hidden_states": normal(2, 7, 32)}
    return Example(UNet2DConditionModel(**options).eval(), inputs)


def _sdxl() -> Example:
    example = _condition(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    example.inputs["added_cond_kwargs"] = {
        "text_embeds": normal(2, 16, seed=1),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1),
    }
    return example


def _lcm() -> Example:
    example = _condition(time_cond_proj_dim=16)
    example.inputs["timestep_cond"] = normal(2, 16, seed=2)
    return example


def _controlnet() -> Example:
    model = ControlNetModel(
        in_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    inputs = {
        "sample": normal(2, 4, 8, 8),
        "timestep": TIMES,
        "encoder_hidden_states": normal(2, 7, 32),
        # Two widths of the conditioning embedding: it halves once.
        "controlnet_cond": normal(2, 3, 16, 16, seed=3),
    }
    return Example(model.eval(), inputs)


def _unet1d() -> Example:
    # The layout of Dance Diffusion: Fourier features of the timestep are appended to the sample.
    model = UNet1DModel(
        sample_size=64,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        block_out_channels=(32, 32, 64),
    )
    times = torch.linspace(1.0, 0.1, 10)
    return Example(model.eval(), {"sample": normal(2, 2, 64), "timestep": times[[2, 7]]}, timesteps=times)


def _unet3d() -> Example:
    model = UNet3DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    inputs = {"sample": normal(2, 4, 3, 8, 8), "timestep": TIMES, "encoder_hidden_states": normal(2, 7, 32)}
    return Example(model.eval(), inputs)


def _motion() -> Example:
    model = UNetMotionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=32,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
        norm_num_groups=8,
    )
    # One prompt a frame, as its pipeline repeats them: axis 0 is a multiple of the batch.
    inputs = {"sample": normal(2, 4, 3, 8, 8), "timestep": TIMES, "encoder_hidden_states": normal(6, 7, 32)}
    return Example(model.eval(), inputs, dynamic_batch=False)


def _spatio_temporal() -> Example:
    model = UNetSpatioTemporalConditionModel(
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=32,
        num_attention_heads=(4, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
    )
    # Stable Video Diffusion's timesteps are 0.25 log(sigma).
    times = 0.25 * torch.linspace(6.5, -6.0, 10)
    inputs = {
        "sample": normal(2, 3, 8, 8, 8),
        "timestep": times[[2, 7]],
        "encoder_hidden_states": normal(2, 1, 32),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(2, 1),
    }
    return Example(model.eval(), inputs, timesteps=times)


def _audioldm2() -> Example:
    model = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=((None, 16, 32),) * 2,
    )
    inputs = {
        "sample": normal(2, 4, 8, 8),
        "timestep": TIMES,
        "encoder_hidden_states": normal(2, 7, 16),
        "encoder_hidden_states_1": normal(2, 5, 32, seed=1),
    }
    return Example(model.eval(), inputs)


UNETS: dict[str, Factory] = {
    "UNet2D": _unet2d,
    "UNet2D, classes": lambda: _unet2d(num_class_embeds=10),
    "UNet2D, scale and shift": lambda: _unet2d(resnet_time_scale_shift="scale_shift"),
    "UNet2D, Fourier time": lambda: _unet2d(time_embedding_type="fourier"),
    "UNet2D, learned time": lambda: _unet2d(time_embedding_type="learned", num_train_timesteps=1000),
    "SD 1": _condition,
    "SD 2": lambda: _condition(use_linear_projection=True, attention_head_dim=(4, 8)),
    "SD inpainting": lambda: _condition(9),
    "skip_time_act": lambda: _condition(
        resnet_skip_time_act=True,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        time_embedding_act_fn="silu",
    ),
    "SDXL": _sdxl,
    "LCM": _lcm,
    "ControlNet": _controlnet,
    "UNet1D": _unet1d,
    "UNet3D": _unet3d,
    "UNetMotion": _motion,
    "UNetSpatioTemporal": _spatio_temporal,
    "AudioLDM2": _audioldm2,
}
