"""Architectures with random weights, narrow enough to try every one in seconds."""

from .diffusers_transformers import TRANSFORMERS
from .diffusers_unets import UNETS
from .example import Example, Factory
from .guided_diffusion import guided_diffusion
from .latent_decoder import vq_decoder
from .packages import PACKAGES
from .plain_ddpm import plain_ddpm

__all__ = ["ARCHITECTURES", "Example", "Factory"]

ARCHITECTURES: dict[str, Factory] = {
    **UNETS,
    "VQ decoder": vq_decoder,
    **TRANSFORMERS,
    "guided-diffusion": guided_diffusion,
    "guided-diffusion, classes": lambda: guided_diffusion(classes=10),
    "plain DDPM, symbolic_trace": plain_ddpm,
    **PACKAGES,
}
