"""The UNets that latency is measured on, with the inputs that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from tfmq_fx import bundled_model_path
from tfmq_fx.data.bundled_model import load_model

__all__ = ["STEPS", "UNETS", "Plain", "UNet"]

#: Sampling steps of a whole run.
STEPS = 50
SEED = 0


class Plain(nn.Module):
    """A diffusers UNet that returns its tensor, so that exported programs need no diffusers to load."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """``sample`` ``[N, C, H, W]``, ``timestep`` ``[N]`` and a prompt, if it takes one, to ``[N, C, H, W]``."""
        conditions = {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states}
        result: Tensor = self.unet(sample, timestep, **conditions).sample
        return result


@dataclass(frozen=True)
class UNet:
    """One UNet.

    Attributes:
        build: Makes it, always with the same weights.
        shape: Of a sample, ``(channels, height, width)``.
        conditions: Shapes of further inputs by name, without the batch axis.
        calibration_rows: Rows that every quantizer calibrates on.
        trained: Whether sampling makes images; otherwise calibration inputs are normal noise.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    calibration_rows: int = 64
    trained: bool = False

    def schedule(self) -> Any:
        """Deterministic DDIM over the linear schedule of DDPM, with its steps set."""
        scheduler = DDIMScheduler(clip_sample=True)
        scheduler.set_timesteps(STEPS)
        return scheduler

    def normal(self, batch: int, seed: int) -> dict[str, Tensor]:
        """A batch of noise, and of normal conditions, without a timestep."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {"sample": self.shape, **self.conditions}
        return {name: torch.randn((batch, *shape), generator=generator) for name, shape in shapes.items()}


def _bundled() -> nn.Module:
    return load_model(bundled_model_path())[0]


def _cifar() -> nn.Module:
    """The configuration of google/ddpm-cifar10-32, 35.7 M parameters, random weights."""
    torch.manual_seed(SEED)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        act_fn="silu",
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


def _stable_diffusion() -> nn.Module:
    """Stable Diffusion 1.5's, 860 M parameters, random weights."""
    from architectures import TRUE_SIZE

    torch.manual_seed(SEED)
    return TRUE_SIZE["SD 1.5, true size"]().model


UNETS: dict[str, UNet] = {
    "bundled": UNet(_bundled, (1, 32, 32), trained=True),
    "cifar": UNet(_cifar, (3, 32, 32)),
    "sd15": UNet(_stable_diffusion, (4, 64, 64), {"encoder_hidden_states": (77, 768)}, calibration_rows=8),
}
