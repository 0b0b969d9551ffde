"""The second half of an unconditional latent diffusion pipeline: the decoder of its VQ autoencoder."""

from __future__ import annotations

from diffusers import VQModel
from torch import Tensor, nn

from .example import Example, normal

__all__ = ["vq_decoder"]


class Decoder(nn.Module):
    """From latents to images, without looking up the codebook (as the pipeline calls it after sampling)."""

    def __init__(self, autoencoder: VQModel) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """``latents`` ``[N, 3, H, W]``; images ``[N, 3, 2H, 2W]``."""
        result: Tensor = self.autoencoder.decode(latents, force_not_quantize=True, return_dict=False)[0]
        return result


def vq_decoder() -> Example:
    """The decoder with random weights; it has no timestep."""
    autoencoder = VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=8,
    )
    return Example(Decoder(autoencoder).eval(), {"latents": normal(2, 3, 8, 8)})
