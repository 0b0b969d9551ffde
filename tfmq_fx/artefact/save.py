"""Save a quantized program: its files are written, checked against what loading admits, and put in their place."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, fx

from tfmq_fx.artefact.folder import filled_folder
from tfmq_fx.artefact.graph_json import graph_to_json
from tfmq_fx.artefact.layout import FORMAT, FORMAT_VERSION, GRAPH, MANIFEST, TENSORS, installed_versions
from tfmq_fx.artefact.manifest import Manifest
from tfmq_fx.artefact.manifest_entries import StoredFile
from tfmq_fx.artefact.packing import needed_bits, pack
from tfmq_fx.artefact.paths import path_of
from tfmq_fx.errors import ArtefactError
from tfmq_fx.frontend.examples import example_arguments
from tfmq_fx.frontend.graph_export import export_graph
from tfmq_fx.frontend.interface_json import model_to_json
from tfmq_fx.frontend.program_stage import describe
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.passes.support.predicates import module_path
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["save"]

log = logging.getLogger(__name__)


@pipeline_stage
def save(program: QuantizedProgram, path: str | Path) -> Path:
    """Write ``program`` to the folder ``path``; an artefact that was there before is replaced at the end.

    The new artefact is complete before the old one goes: a full disk or a kill leaves the old one. Only the files of
    the artefact are replaced; whatever else is in the folder stays.

    Args:
        program: The quantized program; it is not changed.
        path: The folder to write.

    Returns:
        The path.

    Raises:
        ArtefactError: ``path`` holds something that is not an artefact, or it cannot be written, or the program has
            something that an artefact cannot hold.
    """
    if not isinstance(program, QuantizedProgram):
        msg = f"save needs a quantized program, it was given {describe(program)}"
        raise ArtefactError(msg)
    target = path_of(path, "an artefact")
    try:
        with filled_folder(target) as folder:
            _write(program, folder)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        msg = f"the artefact could not be written to {target}: {reason}; what was there before is unchanged"
        raise ArtefactError(msg) from error
    log.info("saved the artefact %s", target)
    return target


def _write(program: QuantizedProgram, folder: Path) -> None:
    args, kwargs = example_arguments(program.graph_module, program.indexed)
    exported = export_graph(program.graph_module, args, kwargs, program.interface.max_batch)
    graph = graph_to_json(exported)
    stored, packed = _pack_all({**exported.state_dict, **exported.constants})
    save_file(stored, folder / TENSORS)
    # A fixed time stamp: the same program gives the same bytes.
    (folder / GRAPH).write_bytes(gzip.compress(graph, mtime=0))
    files = {name: _stored(folder / name) for name in (TENSORS, GRAPH)}
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": installed_versions(),
        "config": program.config.to_dict(),
        "timestep": program.timestep,
        "timesteps": None if program.timesteps is None else program.timesteps.tolist(),
        "scheduler": program.scheduler,
        "interface": model_to_json(program.interface),
        "kept_float": program.kept_float,
        "temporal_choices": [choice.to_dict() for choice in program.temporal_choices],
        "layers": _layer_names(program.graph_module),
        "packed": packed,
        "parameters": [name for name, value in exported.state_dict.items() if isinstance(value, torch.nn.Parameter)],
        "tensors": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in stored.items()},
        "files": {
            TENSORS: files[TENSORS].to_json(),
            GRAPH: {**files[GRAPH].to_json(), "expanded": len(graph)},
        },
    }
    if program.fidelity is not None:
        values["fidelity"] = program.fidelity.to_dict()
    text = json.dumps(values, indent=1, default=str)
    # What could not be loaded is refused now, while the program is still there.
    Manifest.from_bytes(text.encode(), str(folder / MANIFEST))
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _stored(file: Path) -> StoredFile:
    """What the manifest says of a file, read back from the disk."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return StoredFile(file.name, digest, file.stat().st_size)


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
