"""What all engines share, written once a UNet: the exported program, calibration and test inputs, the noise schedule.

Arrays are ``.npz``, so that engines whose environment has no torch can read them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from tfmq_fx import sample_trajectories
from timing.unets import STEPS, UNETS, Plain, UNet

__all__ = ["write"]

#: diffusers' upsampler asks whether the batch is 64 or more.
MAX_BATCH = 63
CALIBRATION_SEED, TEST_SEED = 100, 7


def _calibration(unet: UNet, model: torch.nn.Module) -> dict[str, Tensor]:
    """Rows of inputs over the schedule: from the model's own trajectories, or noise where it was never trained."""
    schedule = unet.schedule()
    if unet.trained:
        rows = unet.calibration_rows
        batches = sample_trajectories(
            model, schedule, steps=STEPS, samples=16, batch_size=16, keep=4, seed=CALIBRATION_SEED, progress=False
        )
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in ("sample", "timestep")}
        picked = torch.linspace(0, len(joined["sample"]) - 1, rows).long()
        return {name: values[picked].contiguous() for name, values in joined.items()}
    made = unet.normal(unet.calibration_rows, CALIBRATION_SEED)
    spread = torch.linspace(0, STEPS - 1, unet.calibration_rows).round().long()
    return {**made, "timestep": schedule.timesteps[spread]}


def write(name: str, folder: Path, batches: list[int]) -> None:
    """Write what is missing of a UNet's folder.

    Args:
        name: Of the UNet.
        folder: Where to.
        batches: Batch sizes that test inputs are made for.
    """
    unet = UNETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    schedule = unet.schedule()
    for batch in batches:
        # The middle of the schedule: there a trained model has neither nothing nor everything to do.
        timestep = schedule.timesteps[STEPS // 2].expand(batch)
        inputs = {**unet.normal(batch, TEST_SEED), "timestep": timestep}
        np.savez(folder / f"inputs-b{batch}.npz", **{key: value.numpy() for key, value in inputs.items()})
    if (folder / "complete.json").is_file():
        return
    model = unet.build()
    calibration = _calibration(unet, model)
    np.savez(folder / "calibration.npz", **{key: value.numpy() for key, value in calibration.items()})
    example = {**unet.normal(2, 0), "timestep": schedule.timesteps[[3, 7]]}
    example = {"sample": example.pop("sample"), "timestep": example.pop("timestep"), **example}
    with torch.no_grad():
        symbol = Dim("batch", min=1, max=MAX_BATCH)
        shapes = {key: {0: symbol} for key in example}
        program = torch.export.export(Plain(model), (), example, dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    about = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "timesteps": schedule.timesteps.tolist(),
        "alphas_cumprod": schedule.alphas_cumprod.tolist(),
    }
    (folder / "complete.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), [int(batch) for batch in sys.argv[3:]])
