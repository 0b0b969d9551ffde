"""torchao's own recipe: ``X86InductorQuantizer`` in its default configuration, compiled with frozen weights.

``aten.mul`` is opted out: left in, the recipe observes the integer timestep and raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latency_engines.engine import Arrays, Step

__all__ = ["files", "load", "prepare"]


def _rows(arrays: Arrays, size: int) -> list[Arrays]:
    count = len(arrays["sample"])
    return [{name: array[at : at + size] for name, array in arrays.items()} for at in range(0, count, size)]


def prepare(folder: Path, settings: Mapping[str, Any]) -> None:
    """Quantize on the common calibration inputs, for one static batch after the other."""
    import torch
    from baselines import stock_program

    calibration = dict(np.load(folder / "calibration.npz"))
    program = torch.export.load(folder / "model.pt2")
    batches = [{k: torch.from_numpy(v) for k, v in rows.items()} for rows in _rows(calibration, 4)]
    stock = stock_program(program.module(check_guards=False), batches)
    first = batches[0]
    symbol = torch.export.Dim("batch", min=1, max=63)
    conditions = {name: {0: symbol} for name in first if name not in ("sample", "timestep")}
    shapes: dict[str, Any] = {"sample": {0: symbol}, "timestep": {0: symbol}}
    if conditions:
        shapes["conditions"] = conditions
    with torch.no_grad():
        exported = torch.export.export(stock, (), first, dynamic_shapes=shapes)
    torch.export.save(exported, _file(folder))


def load(folder: Path, settings: Mapping[str, Any], inputs: Arrays) -> Step:
    """Compile for the shapes of ``inputs``; under bfloat16 autocast where ``settings["bfloat16"]``."""
    import torch
    import torch._inductor.config
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  (registers its patterns)
    from torch._dynamo.utils import counters

    from latency_engines.engine import Unavailable

    model = torch.export.load(_file(folder)).module(check_guards=False)
    torch._inductor.config.freezing = True
    compiled = torch.compile(model, dynamic=False)
    with_bfloat16 = settings.get("bfloat16", False)

    @torch.no_grad()
    def step(arrays: Arrays) -> np.ndarray:
        context = torch.autocast("cpu", torch.bfloat16) if with_bfloat16 else contextlib.nullcontext()
        with context:
            result = compiled(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        array: np.ndarray = result.float().numpy()
        return array

    step(inputs)
    if not counters["inductor"]["qconv_weight_prepack_matcher_count"]:
        msg = "Inductor emitted no integer convolution"
        raise Unavailable(msg)
    return step


def _file(folder: Path) -> Path:
    return folder / "torchao.pt2"


def files(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The converted program."""
    return [_file(folder)]
