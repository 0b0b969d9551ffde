"""The float model: eager, ``torch.compile``, and that in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latency_engines.engine import Arrays, Step

__all__ = ["files", "load"]


def load(folder: Path, settings: Mapping[str, Any], inputs: Arrays) -> Step:
    """Build the model, and compile it for the shapes of ``inputs`` with frozen weights.

    ``settings["bfloat16"]`` is ``"autocast"`` or ``"cast"`` (weights and activations, normalization included).
    """
    import torch
    import torch._inductor.config
    from timing.unets import UNETS, Plain

    model = Plain(UNETS[folder.name].build()).requires_grad_(False)
    bfloat16 = settings.get("bfloat16")
    if bfloat16 == "cast":
        model = model.bfloat16()
    if settings.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)

    def call(arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        if bfloat16 == "cast":
            arguments = {k: v.bfloat16() if v.is_floating_point() else v for k, v in arguments.items()}
        if settings.get("channels_last"):
            arguments["sample"] = arguments["sample"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16 == "autocast"):
            result: torch.Tensor = model(**arguments)
        return result.float()

    if settings["compile"]:
        torch._inductor.config.freezing = True
        compiled = torch.compile(call, dynamic=False)
    else:
        compiled = call

    @torch.no_grad()
    def step(arrays: Arrays) -> np.ndarray:
        result: np.ndarray = compiled({name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        return result

    return step


def files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The exported float program."""
    return [folder / "model.pt2"]
