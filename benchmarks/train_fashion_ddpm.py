"""Train the bundled denoiser: a small DDPM (Ho et al., 2020) on Fashion-MNIST at 32x32.

The model is an ordinary ``diffusers.UNet2DModel`` that predicts epsilon under 1,000 linear-beta
steps. What is exported is the exponential moving average of the weights, as fp16 safetensors in the
layout that ``UNet2DModel.from_pretrained`` and ``DDPMScheduler.from_pretrained`` read.

Data: the four ``*.gz`` idx files of Fashion-MNIST (MIT licence), on Debian and Ubuntu from
``apt-get install dataset-fashion-mnist``.

    python benchmarks/train_fashion_ddpm.py --steps 7000           # train, or go on from the checkpoint
    python benchmarks/train_fashion_ddpm.py --steps 7000 --export tfmq_fx/data/models/fashion-ddpm

The learning rate is flat and falls to zero over the last quarter of ``--steps``, so a run can be cut
short by asking for fewer steps, or lengthened before the fall has begun.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

IDX_HEADER = 16  # bytes: magic number, count, rows, columns
WARMUP = 200
DECAY_SHARE = 0.25


def load_images(folder: Path, split: str = "train") -> Tensor:
    """Return the images as float32 in [-1, 1], shape ``[N, 1, 32, 32]`` (28x28 padded with black)."""
    file = folder / f"{split}-images-idx3-ubyte.gz"
    if not file.exists():
        msg = f"{file} is missing: install Debian's dataset-fashion-mnist, or pass --data"
        raise SystemExit(msg)
    raw = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=IDX_HEADER)
    images = torch.from_numpy(raw.reshape(-1, 1, 28, 28).copy()).float().div(127.5).sub(1.0)
    return nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)


def build_model() -> UNet2DModel:
    """Create the denoiser: three resolutions, attention at 8x8, 2.7 M parameters."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    """Create the noise schedule: 1,000 linear betas, epsilon prediction."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, flat, then linear to zero over the last quarter."""
    fall = (steps - step) / (DECAY_SHARE * steps)
    return peak * max(0.0, min(1.0, (step + 1) / WARMUP, fall))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """``ema <- d * ema + (1 - d) * model`` with ``d = min(decay, (1 + step) / (10 + step))``."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1.0 - d)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside and rename, so that a kill never leaves half a checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


@torch.no_grad()
def sample_grid(model: UNet2DModel, scheduler: DDPMScheduler, path: Path, count: int = 64) -> None:
    """Draw ``count`` DDIM samples (50 steps, seed 0) as one PNG."""
    from PIL import Image

    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(50)
    x = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in ddim.timesteps:
        x = ddim.step(model(x, t).sample, t, x).prev_sample
    side = int(count**0.5)
    tiles = x.clamp(-1, 1).add(1).mul(127.5).round().byte().reshape(side, side, 32, 32)
    Image.fromarray(tiles.permute(0, 2, 1, 3).reshape(side * 32, side * 32).numpy()).resize(
        (side * 64, side * 64), Image.Resampling.NEAREST
    ).save(path)


def export(ema: UNet2DModel, scheduler: DDPMScheduler, folder: Path, card: dict[str, Any]) -> None:
    """Write ``unet/`` (config + fp16 safetensors), ``scheduler/`` and ``training.json``."""
    unet = folder / "unet"
    unet.mkdir(parents=True, exist_ok=True)
    ema.save_config(unet)
    half = {name: tensor.half().contiguous() for name, tensor in ema.state_dict().items()}
    save_file(half, unet / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")


def train(args: argparse.Namespace) -> None:
    """Run, or resume, the training loop; draw a grid and a checkpoint every ``--every`` steps."""
    args.run.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    images = load_images(args.data)
    torch.manual_seed(args.seed)
    model, ema, scheduler = build_model(), build_model(), build_scheduler()
    ema.load_state_dict(model.state_dict())
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema.to(device).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    first, loss_mean, seconds = 0, float("nan"), 0.0
    checkpoint = args.run / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"].cpu())
        first, loss_mean, seconds = state["step"], state["loss"], state["seconds"]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=args.steps, completed=first)
        for step in range(first, args.steps):
            began = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            rows = torch.randint(len(images), (args.batch,), generator=generator)
            clean = images[rows].to(device, memory_format=torch.channels_last)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            t = torch.randint(1000, (args.batch,), generator=generator).to(device)
            noisy = scheduler.add_noise(clean, noise, t).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
            with torch.autocast(device.type, torch.bfloat16):
                predicted = model(noisy, t).sample
            loss = nn.functional.mse_loss(predicted.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            update_ema(ema, model, step, args.ema)
            value = loss.item()
            loss_mean = value if loss_mean != loss_mean else 0.99 * loss_mean + 0.01 * value
            seconds += time.perf_counter() - began
            progress.update(bar, advance=1, description=f"loss {loss_mean:.4f}")
            done = step + 1
            if done % args.every == 0 or done == args.steps:
                state = {
                    "model": model.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(), "step": done, "loss": loss_mean, "seconds": seconds,
                }  # fmt: skip
                save_checkpoint(checkpoint, state)
                sample_grid(ema.cpu(), scheduler, args.run / "samples.png")
                ema.to(device)
                with (args.run / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": done, "loss": loss_mean, "seconds": seconds}) + "\n")
    if args.export:
        card = {
            "data": "Fashion-MNIST train split (MIT licence), 60,000 images, padded to 32x32",
            "steps": args.steps, "batch": args.batch, "lr": args.lr, "ema": args.ema, "seed": args.seed,
            "final_loss": loss_mean, "seconds": round(seconds),
            "parameters": sum(p.numel() for p in ema.parameters()),
        }  # fmt: skip
        export(ema.cpu(), scheduler, args.export, card)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--run", type=Path, default=Path("runs/fashion-ddpm"), help="checkpoints and samples")
    parser.add_argument("--export", type=Path, help="write the EMA weights and configs here at the end")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
