"""Save a quantized program: everything is written beside the target, checked, and then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from tfmq_fx.artefact.graph_json import graph_to_bytes
from tfmq_fx.artefact.layout import (
    FORMAT,
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    TENSORS,
    checksum,
    installed_versions,
    is_artefact,
)
from tfmq_fx.artefact.packing import needed_bits, pack
from tfmq_fx.errors import ArtefactError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.lowering.aot import export_graph
from tfmq_fx.lowering.examples import example_arguments
from tfmq_fx.passes.predicates import module_path
from tfmq_fx.program import QuantizedProgram

__all__ = ["save"]


@in_plain_surroundings
def save(program: QuantizedProgram, path: str | Path) -> Path:
    """Write ``program`` to the folder ``path``; an artefact that was there before is replaced at the end.

    The new artefact is complete before the old one goes: a full disk or a kill leaves the old one.

    Args:
        program: The quantized program; it is not changed.
        path: The folder to write.

    Returns:
        The path.

    Raises:
        ArtefactError: ``path`` holds something that is not an artefact, or it cannot be written.
    """
    target = Path(path)
    if target.exists() and not is_artefact(target):
        msg = f"{target} exists and is not an artefact of tfmq_fx; choose another path or remove it first"
        raise ArtefactError(msg)
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        _write(program, part)
        _replace(part, target)
    except OSError as error:
        reason = error.strerror or str(error)
        msg = f"the artefact could not be written to {target}: {reason}; what was there before is unchanged"
        raise ArtefactError(msg) from error
    except Exception as error:
        # safetensors reports a failed write with an exception of its own.
        if type(error).__name__ != "SafetensorError":
            raise
        msg = f"the artefact could not be written to {target}: {error}; what was there before is unchanged"
        raise ArtefactError(msg) from error
    finally:
        if part is not None and part.exists():
            shutil.rmtree(part, ignore_errors=True)
    return target


def _write(program: QuantizedProgram, folder: Path) -> None:
    args, kwargs = example_arguments(program.graph_module, program.indexed)
    exported = export_graph(program.graph_module, args, kwargs, program.interface.get("max_batch"))
    stored, packed = _pack_all({**exported.state_dict, **exported.constants})
    save_file(stored, folder / TENSORS)
    (folder / GRAPH).write_bytes(graph_to_bytes(exported))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": installed_versions(),
        "config": program.config.to_dict(),
        "timestep": program.timestep,
        "timesteps": None if program.timesteps is None else program.timesteps.tolist(),
        "scheduler": program.scheduler,
        "interface": program.interface,
        "kept_float": program.kept_float,
        "temporal_choices": [choice.to_dict() for choice in program.temporal_choices],
        "layers": _layer_names(program.graph_module),
        "packed": packed,
        "parameters": [name for name, value in exported.state_dict.items() if isinstance(value, torch.nn.Parameter)],
        "tensors": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in stored.items()},
        "checksums": {name: checksum(folder / name) for name in (TENSORS, GRAPH)},
    }
    text = json.dumps(manifest, indent=1, default=str)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for name in (TENSORS, GRAPH, MANIFEST):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _pack_all(tensors: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        bits = needed_bits(tensor)
        if bits == 8:
            stored[name] = tensor.clone()
        else:
            stored[name], stored[f"{name}.lowest"] = pack(tensor, bits)
            packed[name] = {"bits": bits, "shape": list(tensor.shape)}
    return stored, packed


def _layer_names(graph_module: fx.GraphModule) -> dict[str, str]:
    """Map every tensor to the module of the original model that reads it."""
    names = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(graph_module, str(node.target), None), torch.Tensor):
            readers = [module_path(user) for user in node.users]
            names[str(node.target)] = next(filter(None, readers), "")
    return names


def _replace(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = part.with_name(part.name + ".old")
    target.rename(old)
    try:
        part.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
