"""Load a quantized program: every file is read once, checked against the manifest, then taken apart."""

from __future__ import annotations

import hashlib
import warnings
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from tfmq_fx.artefact.graph_json import graph_from_bytes
from tfmq_fx.artefact.layout import GRAPH, MANIFEST, TENSORS, installed_versions
from tfmq_fx.artefact.manifest import MOST_MANIFEST_BYTES, Manifest
from tfmq_fx.artefact.manifest_entries import StoredFile, TensorKind
from tfmq_fx.artefact.packing import unpack
from tfmq_fx.artefact.paths import path_of
from tfmq_fx.artefact.tensor_file import read_tensors
from tfmq_fx.errors import ArtefactError, CaptureError
from tfmq_fx.frontend.interface import INTERFACE_KEY, Interface
from tfmq_fx.frontend.interface_json import model_from_json
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.passes.analysis import row_lookups, row_values
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["load"]

#: Times that an artefact is read again because another process saved it in between.
ATTEMPTS = 3


@pipeline_stage
def load(path: str | Path) -> QuantizedProgram:
    """Read an artefact that :func:`tfmq_fx.save` wrote; bit for bit the program that was saved.

    An artefact is data, and safe to load from anyone: nothing is unpickled, no operator runs that is not on a list
    of those without side effects, and no module is imported but those of diffusers' output classes.
    Checksums, names, shapes, dtypes and sizes are checked before use, and what is checked is what is used: each file
    is read once.

    Args:
        path: The folder.

    Raises:
        ArtefactError: The artefact is missing, foreign, truncated or changed; the message says which
            file or field differs.
    """
    folder = path_of(path, "an artefact")
    for _ in range(ATTEMPTS - 1):
        text = _read_manifest(folder)
        try:
            return _load(folder, text)
        except ArtefactError:
            if _read_manifest(folder) == text:
                raise
    return _load(folder, _read_manifest(folder))


def _load(folder: Path, text: bytes) -> QuantizedProgram:
    manifest = Manifest.from_bytes(text, str(folder / MANIFEST))
    installed = installed_versions()
    differs = [f"{n} {v} (here {installed.get(n)})" for n, v in manifest.versions.items() if installed.get(n) != v]
    if differs:
        warnings.warn(f"the artefact {folder} was saved with {', '.join(differs)}", stacklevel=3)
    graph = _read_file(folder, manifest.files[GRAPH])
    tensors = _tensors(folder, manifest)
    graph_module = graph_from_bytes(bytes(graph), manifest.files[GRAPH].expanded or 0, tensors)
    interface = _interface(folder, manifest, graph_module)
    return QuantizedProgram(
        graph_module=graph_module,
        config=manifest.config,
        interface=interface,
        timestep=manifest.timestep,
        timesteps=_timesteps(folder, manifest, graph_module),
        kept_float=manifest.kept_float,
        scheduler=manifest.scheduler,
        temporal_choices=manifest.temporal_choices,
        fidelity=manifest.fidelity,
    )


def _read_manifest(folder: Path) -> bytes:
    file = folder / MANIFEST
    try:
        if file.is_file() and file.stat().st_size <= MOST_MANIFEST_BYTES:
            return file.read_bytes()
    except OSError as error:
        msg = f"{file} cannot be read ({error.strerror or error}); copy or save it again"
        raise ArtefactError(msg) from error
    msg = f"{folder} is not an artefact of tfmq_fx: it has no {MANIFEST}; make one with tfmq_fx.save"
    raise ArtefactError(msg)


def _read_file(folder: Path, stored: StoredFile) -> bytearray:
    """What is in a file, read once; never more than the manifest says."""
    file = folder / stored.name
    if not file.is_file():
        msg = f"{folder} is incomplete: {stored.name} is missing; copy it again or save the program again"
        raise ArtefactError(msg)
    try:
        # The size first: memory is taken for what is there, not for what the manifest promises.
        data = bytearray(stored.bytes if file.stat().st_size == stored.bytes else 0)
        with file.open("rb", buffering=0) as stream:
            complete = _fill(stream, data)
    except OSError as error:
        msg = f"{file} cannot be read ({error.strerror or error}); copy or save it again"
        raise ArtefactError(msg) from error
    if not complete or hashlib.sha256(data).hexdigest() != stored.sha256:
        msg = f"{file} is truncated or was changed: its checksum differs from the manifest's; copy or save it again"
        raise ArtefactError(msg)
    return data


def _fill(stream: FileIO, data: bytearray) -> bool:
    """Read a file into ``data``; whether that is all of it."""
    view, position = memoryview(data), 0
    while position < len(data):
        count = stream.readinto(view[position:])
        if not count:
            return False
        position += count
    return not stream.read(1)


def _tensors(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors, unpacked; parameters are of their class again."""
    stored = read_tensors(_read_file(folder, manifest.files[TENSORS]), str(folder / TENSORS))
    actual = {name: TensorKind(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in stored.items()}
    for name in sorted(actual.keys() | manifest.tensors.keys()):
        if actual.get(name) != manifest.tensors.get(name):
            actual_text, expected_text = (
                "missing" if kind is None else str(kind.to_json())
                for kind in (actual.get(name), manifest.tensors.get(name))
            )
            msg = (
                f"tensor {name!r} is {actual_text} in {TENSORS} but {expected_text} in {MANIFEST}; "
                "save the program again"
            )
            raise ArtefactError(msg)
    for name, how in manifest.packed.items():
        if name not in stored or f"{name}.lowest" not in stored:
            msg = f"{folder / MANIFEST}: 'packed' names {name!r}, which {TENSORS} does not have; save the program again"
            raise ArtefactError(msg)
        stored[name] = unpack(stored[name], stored.pop(f"{name}.lowest"), how.bits, list(how.shape))
    for name in manifest.parameters:
        if name not in stored or not stored[name].is_floating_point():
            msg = f"{folder / MANIFEST}: 'parameters' names {name!r}, which is no weight; save the program again"
            raise ArtefactError(msg)
        # torch.export tells parameters from buffers by their class, which safetensors does not keep.
        stored[name] = nn.Parameter(stored[name], requires_grad=False)
    return stored


def _interface(folder: Path, manifest: Manifest, graph_module: fx.GraphModule) -> Interface:
    """What the program is called with: read off its graph, with what only the model knew."""
    try:
        interface = model_from_json(Interface.of(graph_module), manifest.interface)
    except CaptureError as error:
        msg = f"{folder}: {error}"
        raise ArtefactError(msg) from error
    graph_module.meta[INTERFACE_KEY] = interface
    return interface


def _timesteps(folder: Path, manifest: Manifest, graph_module: fx.GraphModule) -> Tensor | None:
    """The timesteps of the manifest, which are those of the table where the graph has one."""
    lookups = row_lookups(graph_module)
    if manifest.timesteps is None:
        if lookups:
            msg = f"{folder}: the graph has a table of timesteps and the manifest has none; save the program again"
            raise ArtefactError(msg)
        return None
    timesteps = torch.tensor(manifest.timesteps, dtype=torch.float64)
    if lookups and not torch.equal(row_values(graph_module, lookups[0]), timesteps):
        msg = f"{folder}: the timesteps of the manifest differ from the table in the tensors; save the program again"
        raise ArtefactError(msg)
    inputs = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
    if manifest.timestep not in inputs:
        msg = f"{folder}: 'timestep' of the manifest is {manifest.timestep!r}, which is no input of the graph"
        raise ArtefactError(msg)
    return timesteps
