"""Artefacts to change, with checksums that fit what was changed."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tfmq_fx
from tfmq_fx import QuantizationConfig
from tfmq_fx.artefact.layout import GRAPH, MANIFEST, TENSORS
from tfmq_fx.quantization.program import QuantizedProgram


def read_manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())


def change_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    """Edit the manifest in place."""
    values = read_manifest(folder)
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def resign(folder: Path) -> None:
    """Have the manifest say what is in the files."""

    def sign(manifest: Any) -> None:
        for name in (TENSORS, GRAPH):
            data = (folder / name).read_bytes()
            manifest["files"][name].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    change_manifest(folder, sign)


def read_graph(folder: Path) -> Any:
    return json.loads(gzip.decompress((folder / GRAPH).read_bytes()))


def write_graph(folder: Path, values: Any) -> None:
    """Replace the graph, JSON or its text, and sign it."""
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    (folder / GRAPH).write_bytes(gzip.compress(data, compresslevel=1, mtime=0))
    change_manifest(folder, lambda m: m["files"][GRAPH].update(expanded=len(data)))
    resign(folder)


def change_graph(folder: Path, change: Callable[[Any], Any]) -> None:
    """Edit the graph's JSON in place, and sign it."""
    values = read_graph(folder)
    change(values)
    write_graph(folder, values)


class TinyDenoiser(nn.Module):
    """As little as has a timestep, packed weights, a symbolic batch and several kinds of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.embed = nn.Linear(4, 4)
        self.enter = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.leave = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.embed(nn.functional.silu(self.time(timestep[:, None].float() / 1000)))
        first, second = self.norm(self.enter(sample) + embedding[:, :, None, None]).chunk(2, 1)
        return self.leave(torch.cat([first, nn.functional.gelu(second, approximate="tanh")], 1))


TIMESTEPS = torch.tensor([0, 250, 500, 750])


def inputs(size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 1, 4, 4, generator=generator), TIMESTEPS[torch.arange(size) % 4]


def tiny_program() -> QuantizedProgram:
    torch.manual_seed(0)
    config = QuantizationConfig(weight_bits=4, keep_float=())
    return tfmq_fx.quantize(TinyDenoiser().eval(), config, [inputs()], timesteps=TIMESTEPS, progress=False)
