"""Load a quantized program: check everything against the manifest, then rebuild the graph."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from tfmq_fx.artefact.graph_json import graph_from_bytes
from tfmq_fx.artefact.layout import FORMAT, FORMAT_VERSION, GRAPH, MANIFEST, TENSORS, checksum, installed_versions
from tfmq_fx.artefact.packing import unpack
from tfmq_fx.config import QuantizationConfig
from tfmq_fx.errors import ArtefactError, ConfigError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.passes import RemoveGuards, StripDeadState, run_pipeline
from tfmq_fx.passes.analysis import row_lookups, row_values
from tfmq_fx.program import QuantizedProgram
from tfmq_fx.temporal_choice import TemporalChoice

__all__ = ["load"]


@in_plain_surroundings
def load(path: str | Path) -> QuantizedProgram:
    """Read an artefact that :func:`tfmq_fx.save` wrote; bit for bit the program that was saved.

    Nothing is unpickled; checksums, names, shapes, dtypes and operators are checked before use.

    Args:
        path: The folder.

    Raises:
        ArtefactError: The artefact is missing, foreign, truncated or changed; the message says which
            file or field differs.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    _check_files(folder, manifest)
    tensors = _read_tensors(folder, manifest)
    exported = graph_from_bytes((folder / GRAPH).read_bytes(), tensors)
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    run_pipeline(graph_module, (RemoveGuards, StripDeadState))
    try:
        config = QuantizationConfig.from_dict(manifest["config"])
    except (ConfigError, TypeError) as error:
        msg = f"{folder / MANIFEST} holds a configuration that is not valid: {error}"
        raise ArtefactError(msg) from error
    timesteps = None
    if manifest["timesteps"] is not None:
        timesteps = torch.tensor(manifest["timesteps"], dtype=torch.float64)
        lookups = row_lookups(graph_module)
        if lookups and not torch.equal(row_values(graph_module, lookups[0]), timesteps):
            msg = (
                f"{folder}: the timesteps of the manifest differ from the table in the tensors; save the program again"
            )
            raise ArtefactError(msg)
    return QuantizedProgram(
        graph_module=graph_module,
        config=config,
        timestep=manifest["timestep"],
        timesteps=timesteps,
        kept_float=manifest["kept_float"],
        interface=manifest["interface"],
        scheduler=manifest["scheduler"],
        temporal_choices=tuple(TemporalChoice(**choice) for choice in manifest["temporal_choices"]),
    )


FIELDS = (
    "versions", "config", "timestep", "timesteps", "scheduler", "interface", "kept_float", "temporal_choices",
    "packed", "parameters", "tensors", "checksums",
)  # fmt: skip


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        msg = f"{folder} is not an artefact of tfmq_fx: it has no {MANIFEST}; make one with tfmq_fx.save"
        raise ArtefactError(msg)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{file} is truncated or not JSON ({error}); save the program again"
        raise ArtefactError(msg) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        msg = f"{folder} is not an artefact of tfmq_fx: its {MANIFEST} does not say format {FORMAT!r}"
        raise ArtefactError(msg)
    if manifest.get("format_version") != FORMAT_VERSION:
        msg = (
            f"{folder} has format version {manifest.get('format_version')}, this tfmq_fx reads {FORMAT_VERSION}; "
            "save it again with this version"
        )
        raise ArtefactError(msg)
    if missing := [name for name in FIELDS if name not in manifest]:
        msg = f"{file} has no field {missing[0]!r}; it was changed, save the program again"
        raise ArtefactError(msg)
    here = installed_versions()
    differs = [f"{n} {v} (here {here.get(n)})" for n, v in manifest["versions"].items() if here.get(n) != v]
    if differs:
        warnings.warn(f"the artefact {folder} was saved with {', '.join(differs)}", stacklevel=3)
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for name in (TENSORS, GRAPH):
        file = folder / name
        if not file.is_file():
            msg = f"{folder} is incomplete: {name} is missing; copy it again or save the program again"
            raise ArtefactError(msg)
        if checksum(file) != manifest["checksums"].get(name):
            msg = f"{file} is truncated or was changed: its checksum differs from the manifest's; copy or save it again"
            raise ArtefactError(msg)


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    try:
        stored = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        msg = f"{folder / TENSORS} cannot be read ({error}); copy or save it again"
        raise ArtefactError(msg) from error
    found = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in stored.items()}
    for name in sorted(found.keys() | manifest["tensors"].keys()):
        if found.get(name) != manifest["tensors"].get(name):
            msg = (
                f"tensor {name!r} is {found.get(name, 'missing')} in {TENSORS} but "
                f"{manifest['tensors'].get(name, 'missing')} in {MANIFEST}; save the program again"
            )
            raise ArtefactError(msg)
    for name, how in manifest["packed"].items():
        stored[name] = unpack(stored[name], stored.pop(f"{name}.lowest"), int(how["bits"]), list(how["shape"]))
    for name in manifest["parameters"]:
        # torch.export tells parameters from buffers by their class, which safetensors does not keep.
        stored[name] = nn.Parameter(stored[name], requires_grad=False)
    return stored
