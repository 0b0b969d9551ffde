"""Architectures with random weights: narrow ones, to try every one in seconds, and one in its true size."""

from .diffusers_transformers import TRANSFORMERS
from .diffusers_unets import UNETS
from .example import Example, Factory
from .guided_diffusion import guided_diffusion
from .latent_decoder import vq_decoder
from .packages import PACKAGES
from .plain_ddpm import plain_ddpm
from .stable_diffusion import TRUE_SIZE

__all__ = ["ARCHITECTURES", "TRUE_SIZE", "Example", "Factory"]

ARCHITECTURES: dict[str, Factory] = {
    **UNETS,
    "VQ decoder": vq_decoder,
    **TRANSFORMERS,
    "guided-diffusion": guided_diffusion,
    "guided-diffusion, classes": lambda: guided_diffusion(classes=10),
    "plain DDPM, symbolic_trace": plain_ddpm,
    **PACKAGES,
}
