"""Small models that several tests share."""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn


class TimePath(nn.Module):
    """sinusoid -> Linear -> SiLU -> Linear."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.one = nn.Linear(channels, channels)
        self.two = nn.Linear(channels, channels)
        self.half = channels // 2

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(self.half) / self.half)
        angles = t[:, None].float() * frequencies[None]
        return self.two(nn.functional.silu(self.one(torch.cat([angles.sin(), angles.cos()], 1))))


class Block(nn.Module):
    """A residual block with an embedding layer and, when widths differ, a shortcut conv."""

    def __init__(self, cin: int, cout: int, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.embed = nn.Linear(channels, cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm(x)))
        h = h + self.embed(nn.functional.silu(emb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(nn.functional.silu(h))


class SmallDenoiser(nn.Module):
    """A denoiser with everything that matters and little else: 8x8 images, one skip, one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimePath()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.down = Block(8, 8)
        self.qkv = nn.Linear(8, 24)
        self.up = Block(16, 8)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.denoise(sample, self.time(timestep))

    def denoise(self, sample: Tensor, emb: Tensor) -> Tensor:
        skip = self.enter(sample)
        h = self.down(skip, emb)
        n, c, height, width = h.shape
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).chunk(3, -1)
        a = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        h = h + a.transpose(1, 2).reshape(n, c, height, width)
        return self.leave(self.up(torch.cat([h, skip], 1), emb))


class ClassDenoiser(SmallDenoiser):
    """The same with a label of four classes added to the time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, 16)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.denoise(sample, self.time(timestep) + self.labels(class_labels))


class PromptDenoiser(SmallDenoiser):
    """The same with a pooled prompt added to the time embedding, and cross attention to the prompt's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Linear(6, 16)
        self.query, self.key, self.value = nn.Linear(1, 8), nn.Linear(12, 8), nn.Linear(12, 8)
        self.back = nn.Linear(8, 1)

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:  # type: ignore[override]
        q = self.query(sample.flatten(2).transpose(1, 2))
        k, v = self.key(tokens), self.value(tokens)
        a = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        sample = sample + self.back(a).transpose(1, 2).reshape(sample.shape)
        return self.denoise(sample, self.time(timestep) + self.pool(pooled))


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )


TIMESTEPS = torch.arange(0, 1000, 100)


def small_denoiser(seed: int = 0) -> SmallDenoiser:
    torch.manual_seed(seed)
    return SmallDenoiser().eval()


def batch(size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(TIMESTEPS), (size,), generator=generator)
    return torch.randn(size, 1, 8, 8, generator=generator), TIMESTEPS[rows]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
