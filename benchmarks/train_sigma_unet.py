"""Train the σ-conditioned benchmark model: a guided-diffusion UNet under EDM's preconditioning, on emoji at 32x32.

The model is a ``diffusers.UNet2DModel`` as guided diffusion (Dhariwal and Nichol, 2021) has them: scale-shift norms,
residual blocks that resample, attention at 16x16 and 8x8, a class label. Preconditioning and loss are EDM's (Karras et
al., 2022): the network F sees ``c_in * x`` and the fractional timestep ``ln(sigma) / 4``, so diffusers'
``EDMEulerScheduler`` drives it as it is. Noise levels are EDM's lognormal ones, with a share that is log-uniform over
the whole of [0.002, 80], so that both ends of the schedule are trained too. What is exported is the exponential moving
average of the weights, as fp16 safetensors in diffusers' layout.

Data: Noto Emoji (Apache-2.0) from npm's ``emoji-datasource-google``, its 64x64 pictures laid over white and scaled to
32x32, in one ``.npz``: ``x`` uint8 ``[N, 32, 32, 3]``, ``y`` the category of ``emoji.json``, ``v`` the vendor (``"g"``
is Google; others are left out), ``skin`` whether it is a skin-tone variant (left out).

    python benchmarks/train_sigma_unet.py --data emoji32.npz --seconds 420 --device cuda --compile
    python benchmarks/train_sigma_unet.py --data emoji32.npz --steps 12 --batch 8 --width 8     # a try on the CPU

The learning rate warms up, is flat, and falls to zero over the last third of the run, which ends after ``--seconds``
or ``--steps``, whichever comes first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

#: The class labels, in order: the categories of emoji.json but "Component", which holds five pictures.
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
#: EDM's lognormal noise levels, and the share of those that are log-uniform instead.
P_MEAN, P_STD, UNIFORM_SHARE = -1.2, 1.2, 0.2
WARMUP = 200
DECAY_SHARE = 1 / 3
SHIFT = 2  # pixels that a picture is moved by at most
#: The noise levels whose loss is reported at the end.
REPORTED = (80.0, 20.0, 5.0, 1.0, 0.3, 0.05)


def load_images(file: Path) -> tuple[Tensor, Tensor]:
    """Return pictures as uint8 ``[N, 3, 32, 32]`` and their classes ``[N]``."""
    with np.load(file, allow_pickle=False) as data:
        chosen = (data["v"] == "g") & ~data["skin"] & np.isin(data["y"], CATEGORIES)
        pictures, names = data["x"][chosen], data["y"][chosen]
    labels = torch.tensor([CATEGORIES.index(name) for name in names.tolist()])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), labels


def build_model(width: int = 32) -> UNet2DModel:
    """Create F: three resolutions, attention at the lower two; every residual branch and the output start at zero."""
    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=width,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_class_embeds=len(CATEGORIES),
    )
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".to_out.0", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def build_scheduler() -> EDMEulerScheduler:
    """Create EDM's schedule, which also has its preconditioning."""
    return EDMEulerScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA)


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels ``[N, 1, 1, 1]``: EDM's lognormal ones, or log-uniform ones for a share of the batch."""
    normal = torch.randn(count, generator=generator, device=generator.device) * P_STD + P_MEAN
    low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    uniform = torch.rand(count, generator=generator, device=generator.device) * (high - low) + low
    spread = torch.rand(count, generator=generator, device=generator.device) < UNIFORM_SHARE
    return torch.where(spread, uniform, normal.clamp(low, high)).exp()[:, None, None, None]


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Float pictures in [-1, 1] from uint8 ones, half of them flipped, each moved by up to two pixels over white."""
    count, _, height, width = pictures.shape
    padded = nn.functional.pad(pictures, (SHIFT,) * 4, value=255)
    size, device = (count, 1), generator.device
    offsets = torch.randint(2 * SHIFT + 1, (2, *size), generator=generator, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    flipped = torch.rand(size, generator=generator, device=device) < 0.5
    columns = torch.where(flipped, width - 1 - columns, columns) + offsets[0]
    rows = torch.arange(height, device=device) + offsets[1]
    item = torch.arange(count, device=device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def denoising_loss(model: nn.Module, clean: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """EDM's loss, ``lambda(sigma) |D - y|^2``: with its weights it is the plain squared error of F."""
    scale = (sigma**2 + SIGMA_DATA**2).rsqrt()
    target = (sigma * clean - SIGMA_DATA**2 * noise) * scale / SIGMA_DATA
    with torch.autocast(clean.device.type, torch.bfloat16):
        predicted = model((clean + sigma * noise) * scale, sigma.flatten().log() / 4, labels, return_dict=False)[0]
    return nn.functional.mse_loss(predicted.float(), target)


def learning_rate(step: int, share: float, peak: float) -> float:
    """Linear warm-up, flat, then linear to zero; ``share`` of the run is over."""
    return peak * max(0.0, min(1.0, (step + 1) / WARMUP, (1 - share) / DECAY_SHARE))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """``ema <- d * ema + (1 - d) * model`` with ``d = min(decay, (1 + step) / (10 + step))``."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - d)


@torch.no_grad()
def sample_grid(model: UNet2DModel, path: Path, per_class: int = 10, steps: int = 40) -> None:
    """Draw a row of samples for each class (Euler, 40 steps, seed 0) as one PNG."""
    from PIL import Image

    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    classes = len(CATEGORIES)
    labels = torch.arange(classes, device=model.device).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = noise.to(model.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t.to(model.device), labels).sample
        x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    tiles = x.cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().reshape(classes, per_class, 3, 32, 32)
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(classes * 32, per_class * 32, 3).numpy()
    Image.fromarray(picture).resize((per_class * 64, classes * 64), Image.Resampling.NEAREST).save(path)


def export(ema: UNet2DModel, folder: Path, card: dict[str, Any]) -> None:
    """Write ``unet/`` (config + fp16 safetensors), ``scheduler/``, ``training.json`` and ``samples.png``."""
    unet = folder / "unet"
    unet.mkdir(parents=True, exist_ok=True)
    ema.save_config(unet)
    half = {name: tensor.half().cpu().contiguous() for name, tensor in ema.state_dict().items()}
    save_file(half, unet / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    build_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiffusionPipeline",
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    sample_grid(ema, folder / "samples.png")


@dataclass
class Pictures:
    """The training set on the device, and where its random draws come from."""

    images: Tensor
    labels: Tensor
    generator: torch.Generator

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random augmented pictures in ``[-1, 1]``, their classes, and noise."""
        device = self.images.device
        rows = torch.randint(len(self.images), (count,), generator=self.generator, device=device)
        clean = augment(self.images[rows], self.generator).contiguous(memory_format=torch.channels_last)
        return clean, self.labels[rows], torch.randn(clean.shape, generator=self.generator, device=device)


@torch.no_grad()
def loss_by_sigma(model: nn.Module, data: Pictures, count: int) -> dict[str, float]:
    """The loss at each of the reported noise levels, on as many pictures."""
    clean, labels, noise = data.batch(count)
    sigmas = {sigma: torch.full((count, 1, 1, 1), sigma, device=clean.device) for sigma in REPORTED}
    return {f"{sigma:g}": denoising_loss(model, clean, labels, s, noise).item() for sigma, s in sigmas.items()}


def train(args: argparse.Namespace) -> None:
    """Run the training loop; export every ``--every`` seconds and at the end."""
    began = time.perf_counter()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    images, labels = (part.to(device) for part in load_images(args.data))
    data = Pictures(images, labels, torch.Generator(device).manual_seed(args.seed))
    model, ema = build_model(args.width), build_model(args.width)
    ema.load_state_dict(model.state_dict())
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema.to(device).requires_grad_(False).eval()
    run = torch.compile(model, dynamic=False) if args.compile else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    card: dict[str, Any] = {
        "data": f"Noto Emoji (Apache-2.0) without skin-tone variants, {len(images)} pictures, 32x32 over white",
        "batch": args.batch, "lr": args.lr, "weight_decay": args.weight_decay, "ema": args.ema, "seed": args.seed,
        "machine": f"{machine}, torch {torch.__version__.partition('+')[0]}",
        "parameters": sum(p.numel() for p in ema.parameters()),
    }  # fmt: skip
    losses: list[Tensor] = []
    step, share, exported = 0, 0.0, began
    while share < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, share, args.lr)
        clean, classes, noise = data.batch(args.batch)
        loss = denoising_loss(run, clean, classes, draw_sigmas(args.batch, data.generator), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        update_ema(ema, model, step, args.ema)
        losses = [*losses[-999:], loss.detach()]
        step += 1
        now = time.perf_counter()
        share = max(step / args.steps, (now - began) / args.seconds)
        if step % 50 and share < 1:
            continue
        mean = torch.stack(losses).mean().item()  # waits for the device
        card |= {"steps": step, "final_loss": round(mean, 5), "seconds": round(time.perf_counter() - began)}
        if step % 500 == 0 or step == 50:
            print(f"step {step} loss {mean:.4f} seconds {card['seconds']}", flush=True)
        if args.export and now - exported > args.every and share < 1:
            export(ema, args.export, card)
            exported = time.perf_counter()
    by_sigma = loss_by_sigma(ema, data, args.batch)
    card["loss_by_sigma"] = {sigma: round(value, 5) for sigma, value in by_sigma.items()}
    print(json.dumps(card, indent=2), flush=True)
    if args.export:
        export(ema, args.export, card)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the .npz of emoji")
    parser.add_argument("--export", type=Path, help="write the EMA weights, configs and samples here")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="wall time, compilation included")
    parser.add_argument("--every", type=float, default=60, help="seconds between exports")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=32, help="channels at the full resolution; twice as many below")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
