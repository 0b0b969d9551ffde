"""The diffusion transformers of diffusers, narrow and shallow."""

from __future__ import annotations

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UVit2DModel,
)

from .example import Example, Factory, normal

__all__ = ["TRANSFORMERS"]

TIMES = torch.tensor([100, 700])


def _dit() -> Example:
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )
    inputs = {"hidden_states": normal(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 7])}
    return Example(model.eval(), inputs)


def _pixart() -> Example:
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=24,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 24, seed=1),
        "timestep": TIMES,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Example(model.eval(), inputs)


def _sd3() -> Example:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    times = torch.linspace(1000.0, 1.0, 10)
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 24, seed=1),
        "pooled_projections": normal(2, 16, seed=2),
        "timestep": times[[2, 7]],
    }
    return Example(model.eval(), inputs, timesteps=times)


def _flux() -> Example:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    times = torch.linspace(1.0, 0.1, 10)
    positions = torch.zeros(16, 3)
    positions[:, 1], positions[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    inputs = {
        "hidden_states": normal(2, 16, 16),
        "encoder_hidden_states": normal(2, 7, 24, seed=1),
        "pooled_projections": normal(2, 16, seed=2),
        "timestep": times[[2, 7]],
        "img_ids": positions,
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    return Example(model.eval(), inputs, timesteps=times)


def _hunyuan() -> Example:
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=7,
        text_len_t5=5,
    )
    angles = normal(16, 16, seed=5)
    inputs = {
        "hidden_states": normal(2, 4, 8, 8),
        # It computes in the dtype of its timestep; its pipeline passes that of the latents.
        "timestep": TIMES.float(),
        "encoder_hidden_states": normal(2, 7, 24, seed=1),
        "text_embedding_mask": torch.ones(2, 7, dtype=torch.bool),
        "encoder_hidden_states_t5": normal(2, 5, 16, seed=2),
        "text_embedding_mask_t5": torch.ones(2, 5, dtype=torch.bool),
        "image_meta_size": torch.full((2, 6), 64.0),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return Example(model.eval(), inputs)


def _uvit() -> Example:
    model = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=33,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=8,
    )
    inputs = {
        "input_ids": torch.arange(128).reshape(2, 8, 8) % 33,
        "encoder_hidden_states": normal(2, 7, 24, seed=1),
        "pooled_text_emb": normal(2, 16, seed=2),
        "micro_conds": torch.full((2, 5), 64.0),
    }
    return Example(model.eval(), inputs)


TRANSFORMERS: dict[str, Factory] = {
    "DiT": _dit,
    "PixArt": _pixart,
    "SD3": _sd3,
    "Flux": _flux,
    "HunyuanDiT": _hunyuan,
    "UViT2D": _uvit,
}
