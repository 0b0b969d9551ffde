"""Trained models beside the bundled one, for benchmarks and experiments. What each is stands in its README.md."""

from __future__ import annotations

import os
from pathlib import Path

from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.data.protocols import Scheduler

__all__ = ["EMOJI_MODEL", "SIGMA_MODEL", "load_emoji_model", "load_sigma_model"]

#: A guided-diffusion UNet under EDM's preconditioning: sigma from 80 to 0.002, class labels 0 to 8, RGB 32x32.
SIGMA_MODEL = Path(__file__).parent / "models" / "sigma-emoji"
#: An RGB 32x32 DDPM of 1.1 million parameters, beside the repository where it is there at all.
EMOJI_MODEL = Path(os.environ.get("TFMQ_FX_EMOJI", Path(__file__).resolve().parents[2] / "shared" / "data" / "emoji"))


def load_emoji_model() -> tuple[nn.Module, Scheduler]:
    """The emoji model in float32 and evaluation mode, and its scheduler."""
    model = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64, 64), layers_per_block=1,
        norm_num_groups=16, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    weights = load_file(EMOJI_MODEL / "emoji_ddpm.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval(), DDIMScheduler(1000, beta_schedule="linear")


def load_sigma_model() -> tuple[nn.Module, Scheduler]:
    """The σ-conditioned model in float32 and evaluation mode, and its ``EDMEulerScheduler``.

    It is called with ``class_labels``, and its timesteps are ``ln(sigma) / 4``::

        model, scheduler = load_sigma_model()
        labels = torch.arange(18) % 9
        batches = tfmq_fx.sample_trajectories(model, scheduler, samples=18, extra={"class_labels": labels})
    """
    return load_model(SIGMA_MODEL)
