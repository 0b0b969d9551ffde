"""Trained models beside the bundled one, for benchmarks and experiments. What each is stands in its README.md."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tfmq_fx.data.bundled_model import load_model
from tfmq_fx.data.protocols import Scheduler

__all__ = ["SIGMA_MODEL", "load_sigma_model"]

#: A guided-diffusion UNet under EDM's preconditioning: sigma from 80 to 0.002, class labels 0 to 8, RGB 32x32.
SIGMA_MODEL = Path(__file__).parent / "models" / "sigma-emoji"


def load_sigma_model() -> tuple[nn.Module, Scheduler]:
    """The σ-conditioned model in float32 and evaluation mode, and its ``EDMEulerScheduler``.

    It is called with ``class_labels``, and its timesteps are ``ln(sigma) / 4``::

        model, scheduler = load_sigma_model()
        labels = torch.arange(18) % 9
        batches = tfmq_fx.sample_trajectories(model, scheduler, samples=18, extra={"class_labels": labels})
    """
    return load_model(SIGMA_MODEL)
