"""Hold a quantized denoiser against its float original: the same noise, PSNR, speed and size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from tfmq_fx.data.prediction import predicted
from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.errors import ConfigError

__all__ = [
    "Latency",
    "check_image_path",
    "ddim_scheduler",
    "float_bytes",
    "image_grid",
    "interleaved_latency",
    "path_bytes",
    "psnr",
    "sample_images",
]

#: Distance from the darkest to the brightest value of an image in [-1, 1].
PEAK = 2.0
#: Grids of small images are enlarged until a tile is at least this wide, in pixels.
TILE_WIDTH = 64
LABEL_HEIGHT = 24
LABEL_SIZE = 14.0
MARGIN = 8


def ddim_scheduler(scheduler: Scheduler | Mapping[str, Any], steps: int) -> Scheduler:
    """A deterministic DDIM scheduler (Song et al., 2021; eta 0) over another scheduler's noise schedule.

    Args:
        scheduler: A diffusers scheduler, or its configuration as a mapping. It is not changed.
        steps: Sampling steps; ``timesteps`` of the result are set.

    Raises:
        ConfigError: The number of steps is not possible with this schedule.
    """
    from diffusers import DDIMScheduler

    ddim: Scheduler = DDIMScheduler.from_config(dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config))
    try:
        ddim.set_timesteps(steps)
    except (ValueError, ZeroDivisionError) as error:
        msg = f"{steps} sampling steps are not possible: use 1 to {ddim.config['num_train_timesteps']}"
        raise ConfigError(msg) from error
    return ddim


@torch.no_grad()
def sample_images(
    denoiser: Callable[..., Any],
    scheduler: Scheduler | Mapping[str, Any],
    *,
    steps: int,
    noise: Tensor | Sequence[int],
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Sample images by deterministic DDIM, so that two denoisers can start from the same noise.

    Args:
        denoiser: Called as ``denoiser(sample, timestep)`` with a 0-dim timestep, like a diffusers model.
        scheduler: Gives the noise schedule (:func:`ddim_scheduler`).
        steps: Sampling steps.
        noise: The noise to start from, ``[N, C, H, W]``, or the shape of noise to draw with ``seed``.
        seed: Used only when ``noise`` is a shape.
        on_step: Called after every step, for progress bars.

    Returns:
        Images, ``[N, C, H, W]``, in [-1, 1] up to what the model overshoots.
    """
    ddim = ddim_scheduler(scheduler, steps)
    if not isinstance(noise, Tensor):
        noise = torch.randn(tuple(noise), generator=torch.Generator().manual_seed(seed))
    x: Tensor = noise * ddim.init_noise_sigma
    for timestep in ddim.timesteps:
        prediction = predicted(denoiser(x, timestep), x.shape[1])
        x = ddim.step(prediction, timestep, x).prev_sample
        if on_step is not None:
            on_step()
    return x


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images: ``10 log10(peak^2 / mean((a - b)^2))``.

    Args:
        a: Images, ``[N, ...]``, clamped to [-1, 1]; the peak is 2.
        b: Images of the same shape.

    Returns:
        Decibels, float64 ``[N]``; infinite for equal images.
    """
    difference = a.double().clamp(-1, 1) - b.double().clamp(-1, 1)
    error = difference.square().flatten(1).mean(dim=1)
    return 10 * torch.log10(PEAK**2 / error)


def check_image_path(path: Path) -> None:
    """Raise unless an image can be written under that name; long work is in vain otherwise.

    Raises:
        ConfigError: Its ending names no image format.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        msg = f"{path} does not say which kind of image to write: let its name end in .png"
        raise ConfigError(msg)


def image_grid(panels: Sequence[tuple[str, Tensor]], *, columns: int | None = None) -> Image.Image:
    """Draw labelled panels of images side by side; the same place in each panel is the same noise.

    Args:
        panels: Label and images ``[N, C, H, W]`` in [-1, 1] (clamped), ``C`` 1 or 3, of one shape.
        columns: Images in a row of a panel; by default such that a panel is about square.
    """
    count, _, height, width = panels[0][1].shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = max(1, math.ceil(TILE_WIDTH / width))
    size = (columns * width * scale, math.ceil(count / columns) * height * scale)
    grid = Image.new("RGB", (len(panels) * (size[0] + MARGIN) - MARGIN, LABEL_HEIGHT + size[1]), "white")
    draw = ImageDraw.Draw(grid)
    for index, (label, images) in enumerate(panels):
        left = index * (size[0] + MARGIN)
        overflow = ImageFont.load_default(LABEL_SIZE).getlength(label) / (size[0] - MARGIN)
        font = ImageFont.load_default(LABEL_SIZE / max(1.0, overflow))
        draw.text((left, LABEL_HEIGHT / 2), label, fill="black", anchor="lm", font=font)
        panel = _panel(images, columns).resize(size, Image.Resampling.NEAREST)
        grid.paste(panel, (left, LABEL_HEIGHT))
    return grid


def _panel(images: Tensor, columns: int) -> Image.Image:
    """One panel at the images' own resolution; places behind the last image stay black."""
    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    pixels = images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().expand(-1, 3, -1, -1)
    canvas = torch.zeros(rows * columns, 3, height, width, dtype=torch.uint8)
    canvas[:count] = pixels
    tiles = canvas.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(tiles.reshape(rows * height, columns * width, 3).numpy())


@dataclass(frozen=True)
class Latency:
    """Seconds per call, as the median and its spread, which single slow rounds do not move.

    Attributes:
        median: The median.
        low: First quartile.
        high: Third quartile.
        rounds: Calls that were timed.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Summarise the timed calls (at least one)."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    def __str__(self) -> str:
        """Milliseconds: median and quartiles."""
        return f"{self.median * 1e3:.1f} ms ({self.low * 1e3:.1f}–{self.high * 1e3:.1f})"


def interleaved_latency(
    callables: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 3
) -> dict[str, list[float]]:
    """Time several callables in turns, A B C A B C …, so that a busy machine slows all of them alike.

    Args:
        callables: What to time, by name.
        rounds: Timed calls of each.
        warmup: Calls of each before that, which also compile what compiles on its first call.

    Returns:
        Seconds of every timed call, by name, in order.

    Raises:
        ConfigError: ``rounds`` is below 1.
    """
    if rounds < 1:
        msg = f"rounds={rounds!r} must be at least 1"
        raise ConfigError(msg)
    for call in callables.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(rounds):
        for name, call in callables.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def path_bytes(path: str | Path) -> int:
    """Size of a file, or of all files of a folder, in bytes."""
    path = Path(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def float_bytes(model: nn.Module) -> int:
    """Size of a model's parameters and saved buffers in float32, in bytes."""
    return sum(4 * tensor.numel() for tensor in model.state_dict().values())
