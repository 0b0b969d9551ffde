"""The UNet of Stable Diffusion 1.5 in its true size, with random weights."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from .example import Example, Factory, normal

__all__ = ["TRUE_SIZE"]


def _stable_diffusion_15() -> Example:
    # The published configuration; what is not named is the default of diffusers.
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    inputs = {
        "sample": normal(1, 4, 32, 32),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": normal(1, 77, 768, seed=1),
    }
    return Example(model.eval(), inputs, dynamic_batch=False)


TRUE_SIZE: dict[str, Factory] = {"SD 1.5, true size": _stable_diffusion_15}
