"""Sampling of many images by deterministic DDIM, kept in a folder, so that a run that was cut off goes on.

Image ``i`` of a seed starts from the same noise whatever the denoiser, the batch size and the number of images.
Pixels are kept as 8 bits, which is what the measures read; the first images in float32 too, for PSNR.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq_fx.diagnostics.comparison import ddim_scheduler, sample_images

from .efficientnet_lite0 import to_pixels

__all__ = ["Samples", "missing_timesteps", "noise", "sample_cached"]

META = "sampling.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Samples:
    """Sampled images.

    Attributes:
        pixels: All of them, uint8 ``[N, C, H, W]``.
        exact: The first of them as the sampler left them, float32 ``[K, C, H, W]``.
    """

    pixels: Tensor
    exact: Tensor


def sample_cached(
    denoiser: Callable[..., Any],
    scheduler: Any,
    folder: str | Path,
    *,
    identity: str,
    steps: int,
    count: int,
    batch_size: int = 50,
    shape: Sequence[int] = (1, 32, 32),
    seed: int = 0,
    exact: int = 64,
    on_step: Callable[[int, int], None] | None = None,
) -> Samples:
    """Sample images, or read those that are in the folder and sample the rest.

    Args:
        denoiser: Called as ``denoiser(sample, timestep)`` with a 0-dim timestep, like a diffusers model.
        scheduler: Gives the noise schedule (:func:`tfmq_fx.diagnostics.comparison.ddim_scheduler`).
        folder: Holds one file a batch; a batch is written when it is complete.
        identity: What the denoiser is, such as a name and a checksum: images of another one are not mixed in.
        steps: Sampling steps. A quantized program must have these timesteps (:func:`missing_timesteps`).
        count: Images; a folder with fewer is filled up.
        batch_size: Images that are denoised at once.
        shape: Of one image.
        seed: Of the noise.
        exact: So many of the first images are kept in float32.
        on_step: Called with the image-steps done, those read from the folder included, and all of them.

    Raises:
        ValueError: The folder holds images that were sampled in another way.
    """
    folder = Path(folder)
    about = {
        "format_version": FORMAT_VERSION,
        "identity": identity,
        "scheduler": {name: value for name, value in ddim_scheduler(scheduler, steps).config.items() if name[0] != "_"},
        "steps": steps,
        "batch_size": batch_size,
        "shape": list(shape),
        "seed": seed,
        "exact": exact,
    }
    _claim(folder, about)
    done, total = 0, count * steps
    pixels, floats = [], []
    for index, start in enumerate(torch.split(noise(count, shape, seed), batch_size)):
        file = folder / f"batch-{index:05d}.npz"
        stored = _read(file)
        if stored is None or len(stored.pixels) != len(start):
            ticks = itertools.count(done + len(start), len(start))

            def advance(ticks: Iterator[int] = ticks) -> None:
                if on_step is not None:
                    on_step(next(ticks), total)

            images = sample_images(denoiser, scheduler, steps=steps, noise=start, on_step=advance)
            stored = Samples(to_pixels(images), images[: max(0, exact - index * batch_size)].float())
            _write(file, stored)
        elif on_step is not None:
            on_step(done + len(start) * steps, total)
        done += len(start) * steps
        pixels.append(stored.pixels)
        floats.append(stored.exact)
    return Samples(torch.cat(pixels), torch.cat(floats))


def noise(count: int, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise ``[count, *shape]``, drawn image by image: fewer images get the same first ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(tuple(shape), generator=generator) for _ in range(count)])


def missing_timesteps(scheduler: Any, steps: int, table: Iterable[float]) -> list[int]:
    """The timesteps that sampling in ``steps`` steps visits and a quantized program's table does not hold."""
    known = {float(value) for value in table}
    return [timestep for timestep in ddim_scheduler(scheduler, steps).timesteps.tolist() if timestep not in known]


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Note what the folder is for, or compare with what is noted there."""
    file = folder / META
    wanted = json.loads(json.dumps(about, default=str))
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if different:
            name = different[0]
            msg = (
                f"{folder} holds images with {name}={found.get(name)!r}, not {wanted.get(name)!r}; "
                "name another folder, or remove this one"
            )
            raise ValueError(msg)
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{META}.{os.getpid()}.part"
    part.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


def _read(file: Path) -> Samples | None:
    """What :func:`_write` wrote, None when it wrote nothing."""
    if not file.is_file():
        return None
    with np.load(file) as stored:
        return Samples(torch.from_numpy(stored["pixels"]), torch.from_numpy(stored["exact"]))


def _write(file: Path, samples: Samples) -> None:
    """Write beside and rename, so that the file is whole or absent."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with part.open("wb") as stream:
        np.savez(stream, pixels=samples.pixels.numpy(), exact=samples.exact.numpy())
    part.replace(file)
