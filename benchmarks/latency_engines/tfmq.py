"""Ours: quantized by ``tfmq_fx``, lowered by one of its backends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latency_engines.engine import Arrays, Step, Unavailable

__all__ = ["files", "load", "prepare"]

#: Rows of a calibration batch.
ROWS = 4


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Quantize on the common calibration inputs and save the artefact, which serves every backend."""
    import json

    import torch
    from timing.unets import UNETS

    import tfmq_fx

    arrays = np.load(folder / "calibration.npz")
    values = {name: torch.from_numpy(arrays[name]) for name in ("sample", "timestep", *UNETS[folder.name].conditions)}
    count = len(values["sample"])
    batches = [{k: v[at : at + ROWS] for k, v in values.items()} for at in range(0, count, ROWS)]
    timesteps = json.loads((folder / "complete.json").read_text(encoding="utf-8"))["timesteps"]
    config = tfmq_fx.QuantizationConfig(weight_bits=settings["weight_bits"])
    model = UNETS[folder.name].build()
    program = tfmq_fx.quantize(model, config, batches, timesteps=torch.tensor(timesteps), progress=False)
    tfmq_fx.save(program, _artefact(folder, settings))


def load(folder: Path, settings: Mapping[str, Any], inputs: Arrays) -> Step:
    """Load the artefact and lower it; of ``"aot"`` load the package, which only the first start compiles."""
    import torch

    import tfmq_fx

    backend = settings["backend"]
    if backend == "aot":
        package = _package(folder, settings)
        if not package.is_file():
            tfmq_fx.lower(tfmq_fx.load(_artefact(folder, settings)), "aot", path=package)
        denoiser = tfmq_fx.load_denoiser(package)
    else:
        try:
            denoiser = tfmq_fx.lower(tfmq_fx.load(_artefact(folder, settings)), backend)
        except tfmq_fx.LoweringError as error:
            msg = f"lower(backend={backend!r}) refuses: {error}"
            raise Unavailable(msg) from error

    def step(arrays: Arrays) -> np.ndarray:
        result = denoiser(**{name: torch.from_numpy(array) for name, array in arrays.items()}, return_dict=False)
        array: np.ndarray = result[0].numpy()
        return array

    return step


def _artefact(folder: Path, settings: Mapping[str, Any]) -> Path:
    return folder / f"ours-w{settings['weight_bits']}a8"


def _package(folder: Path, settings: Mapping[str, Any]) -> Path:
    return folder / f"ours-w{settings['weight_bits']}a8.pt2"


def files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The artefact, which serves every backend; of ``"aot"`` the package."""
    if settings["backend"] == "aot":
        return [_package(folder, settings)]
    return sorted(file for file in _artefact(folder, settings).rglob("*") if file.is_file())
