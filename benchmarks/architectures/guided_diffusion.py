"""A UNet in the manner of guided-diffusion (``openaimodel`` in Stable Diffusion's first code); nothing of diffusers.

What differs for a graph rewrite: sequential modules that pass the embedding only to some of their members, scale and
shift from one embedding layer, attention over flattened positions with 1-d convolutions for q, k, v, residual blocks
that resample inside. After Dhariwal & Nichol, *Diffusion Models Beat GANs on Image Synthesis*, NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .example import Example, normal

__all__ = ["GuidedUNet", "guided_diffusion"]


def _zeroed(layer: nn.Module) -> nn.Module:
    """The original starts these at zero; a little noise here, so that what follows them is seen."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    return layer


class WithEmbedding(nn.Module):
    """A member of :class:`Route` that takes the embedding too."""


class Route(nn.Sequential):
    """A sequence that hands the embedding to the members that take it."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` ``[N, C, H, W]``, ``embedding`` ``[N, E]``."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, WithEmbedding) else layer(x)
        return x


class ResBlock(WithEmbedding):
    """norm - SiLU - (resample) - conv, scale and shift from the embedding, norm - SiLU - conv, and the shortcut."""

    def __init__(self, width: int, embedding: int, out: int, resample: str = "") -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(8, out), nn.SiLU(), nn.Dropout(0.1), _zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        self.resample: nn.Module = {
            "": nn.Identity(),
            "up": nn.Upsample(scale_factor=2, mode="nearest"),
            "down": nn.AvgPool2d(2),
        }[resample]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` ``[N, C, H, W]``, ``embedding`` ``[N, E]``."""
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        embedded = self.emb_layers(embedding)
        while embedded.ndim < h.ndim:
            embedded = embedded[..., None]
        scale, shift = embedded.chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        h = self.out_layers[1:](h)
        result: Tensor = self.skip_connection(self.resample(x)) + h
        return result


class AttentionBlock(nn.Module):
    """Self-attention over all positions, with 1-d convolutions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = _zeroed(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[N, C, H, W]``."""
        n, c, *space = x.shape
        flat = x.reshape(n, c, -1)
        length = flat.shape[-1]
        q, k, v = self.qkv(self.norm(flat)).reshape(n * self.heads, -1, length).chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(c // self.heads))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        attended = torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)
        return (flat + self.proj_out(attended)).reshape(n, c, *space)


class GuidedUNet(nn.Module):
    """The UNet: two levels, one residual block each, attention at the lower one."""

    def __init__(self, width: int = 16, classes: int = 0) -> None:
        super().__init__()
        embedding = 4 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label_emb = nn.Embedding(classes, embedding) if classes else None
        self.input_blocks = nn.ModuleList(
            [
                Route(nn.Conv2d(3, width, 3, padding=1)),
                Route(ResBlock(width, embedding, width)),
                Route(ResBlock(width, embedding, width, "down")),
                Route(ResBlock(width, embedding, 2 * width), AttentionBlock(2 * width, 2)),
            ]
        )
        self.middle_block = Route(
            ResBlock(2 * width, embedding, 2 * width),
            AttentionBlock(2 * width, 2),
            ResBlock(2 * width, embedding, 2 * width),
        )
        self.output_blocks = nn.ModuleList(list(self._outputs(width, embedding)))
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), _zeroed(nn.Conv2d(width, 6, 3, padding=1)))

    @staticmethod
    def _outputs(width: int, embedding: int) -> Iterator[Route]:
        yield Route(ResBlock(4 * width, embedding, 2 * width), AttentionBlock(2 * width, 2))
        yield Route(
            ResBlock(3 * width, embedding, 2 * width),
            AttentionBlock(2 * width, 2),
            ResBlock(2 * width, embedding, 2 * width, "up"),
        )
        yield Route(ResBlock(3 * width, embedding, width))
        yield Route(ResBlock(2 * width, embedding, width))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise and variance of ``x`` ``[N, 3, H, W]`` at ``timesteps`` ``[N]`` for classes ``y`` ``[N]``."""
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps[:, None].float() * frequencies[None]
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        result: Tensor = self.out(x)
        return result


def guided_diffusion(classes: int = 0) -> Example:
    """The UNet with random weights."""
    inputs = {"x": normal(2, 3, 16, 16), "timesteps": torch.tensor([100, 700])}
    if classes:
        inputs["y"] = torch.tensor([1, 7])
    return Example(GuidedUNet(classes=classes).eval(), inputs, timestep="timesteps")
