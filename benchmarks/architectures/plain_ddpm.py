"""A DDPM's UNet by hand, without any control flow, so that ``torch.fx.symbolic_trace`` can read it.

After Ho et al., *Denoising Diffusion Probabilistic Models*, NeurIPS 2020.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from .example import Example, normal

__all__ = ["PlainUNet", "plain_ddpm"]


class Residual(nn.Module):
    """norm - swish - conv, plus the projected embedding, norm - swish - conv, and the shortcut."""

    def __init__(self, width: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, out, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, out)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """``x`` ``[N, C, H, W]``, ``temb`` ``[N, E]``."""
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h))
        h = h + self.temb_proj(temb * torch.sigmoid(temb))[:, :, None, None]
        h = self.norm2(h)
        result: Tensor = self.shortcut(x) + self.conv2(h * torch.sigmoid(h))
        return result


class SelfAttention(nn.Module):
    """One head over all positions, by 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[N, C, H, W]``."""
        h = self.norm(x)
        q, k, v = self.q(h).flatten(2), self.k(h).flatten(2), self.v(h).flatten(2)
        weight = torch.softmax(torch.bmm(q.transpose(1, 2), k) * self.scale, dim=2)
        result: Tensor = x + self.proj_out(torch.bmm(v, weight.transpose(1, 2)).view_as(x))
        return result


class PlainUNet(nn.Module):
    """Two levels with one residual block each, one attention in the middle."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        embedding = 4 * width
        half = width // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1)))
        self.frequencies: Tensor
        self.temb1, self.temb2 = nn.Linear(width, embedding), nn.Linear(embedding, embedding)
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down1 = Residual(width, width, embedding)
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2 = Residual(width, 2 * width, embedding)
        self.middle1, self.attention, self.middle2 = (
            Residual(2 * width, 2 * width, embedding),
            SelfAttention(2 * width),
            Residual(2 * width, 2 * width, embedding),
        )
        self.up2 = Residual(4 * width, 2 * width, embedding)
        self.upsample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, 2 * width, 3, padding=1))
        self.up1 = Residual(3 * width, width, embedding)
        self.norm_out, self.conv_out = nn.GroupNorm(8, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise of ``x`` ``[N, 3, H, W]`` at timesteps ``t`` ``[N]``."""
        angles = t.unsqueeze(1).float() * self.frequencies
        temb = self.temb1(torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = self.temb2(temb * torch.sigmoid(temb))
        entry = self.conv_in(x)
        high = self.down1(entry, temb)
        low = self.down2(self.downsample(high), temb)
        h = self.middle2(self.attention(self.middle1(low, temb)), temb)
        h = self.up2(torch.cat([h, low], dim=1), temb)
        h = self.up1(torch.cat([self.upsample(h), high], dim=1), temb)
        h = self.norm_out(h)
        result: Tensor = self.conv_out(h * torch.sigmoid(h))
        return result


def plain_ddpm(traced: bool = True) -> Example:
    """The UNet with random weights, through symbolic tracing or as a module."""
    model = PlainUNet().eval()
    inputs = {"x": normal(2, 3, 16, 16), "t": torch.tensor([100, 700])}
    return Example(fx.symbolic_trace(model) if traced else model, inputs, timestep="t")
