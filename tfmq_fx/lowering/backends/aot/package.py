"""The ahead-of-time backend: an AOTInductor package that needs neither the model's source nor a compiler."""

from __future__ import annotations

import contextlib
import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tfmq_fx._torch.compilation import load_pt2
from tfmq_fx.artefact.temporal_program import StoredTemporalProgram
from tfmq_fx.config.choices import UnknownTimestep
from tfmq_fx.errors import ArtefactError, LoweringError
from tfmq_fx.lowering.backends.aot.checksums import UNREADABLE, check_members, record_checksums
from tfmq_fx.lowering.backends.aot.machine import Machine
from tfmq_fx.lowering.backends.aot.manifest import FORMAT, FORMAT_VERSION, MOST_BYTES, PackageManifest
from tfmq_fx.lowering.backends.inductor.compiler import freezing
from tfmq_fx.lowering.backends.inductor.kernels import KernelCounter
from tfmq_fx.temporal.program import TemporalProgram

__all__ = ["Package", "check_package_path", "compile_package", "describe_package", "is_package", "load_models",
           "load_package", "staged_package"]  # fmt: skip

ABOUT = "extra/tfmq_fx.json"
#: The folder of the temporal program; torch reads every file of "extra" as text.
TEMPORAL = "temporal"


@torch.no_grad()
def compile_package(programs: Mapping[str, ExportedProgram], path: Path) -> KernelCounter:
    """Compile programs with frozen weights into the package ``path`` (``.pt2``).

    Args:
        programs: Exported q/dq graphs by the name that they are loaded under.
        path: Where the package goes.

    Returns:
        The integer kernels in it.
    """
    from tfmq_fx._torch.inductor import compile_to_files, package_aoti

    compiled: dict[str, list[Any]] = {}
    total = KernelCounter()
    for name, program in programs.items():
        counter = KernelCounter()
        assert program.example_inputs is not None
        # The counter is not among the options: those are copied, and a copy would do the counting.
        with freezing(counter):
            compiled[name] = compile_to_files(
                program.module(check_guards=False),
                program.example_inputs,
                {"aot_inductor.package": True, "freezing": True},
            )
        total.counts += counter.counts
    package_aoti(str(path), compiled)
    return total


def check_package_path(path: Path) -> None:
    """Find out whether a package can be written to ``path`` before minutes of compiling.

    Raises:
        LoweringError: It is a folder or a file of somebody else, or its folder cannot be written to.
    """
    try:
        with _staging_folder(path):
            pass
    except OSError as error:
        msg = f"the package {path} cannot be written: {error.strerror or error}; choose another path"
        raise LoweringError(msg) from error
    if path.is_dir():
        msg = f"the package {path} cannot be written: a folder is there; choose another path"
        raise LoweringError(msg)
    if path.exists() and not is_package(path) and not (path.is_file() and path.stat().st_size == 0):
        msg = f"{path} exists and is not a package of tfmq_fx; choose another path or remove it first"
        raise LoweringError(msg)


@contextlib.contextmanager
def staged_package(path: Path) -> Iterator[Path]:
    """Where to write the package ``path``: it takes its place when the block ends without an error.

    Raises:
        LoweringError: Something else came to be at ``path`` meanwhile, or it cannot be put there.
    """
    # Behind a link, as what is written to it would be.
    target = path.resolve()
    with _staging_folder(target) as folder:
        # The same name: torch calls the root of the archive like the file.
        part = Path(folder) / target.name
        yield part
        check_package_path(path)
        try:
            part.replace(target)
        except OSError as error:
            msg = f"the package {path} cannot be written: {error.strerror or error}; choose another path"
            raise LoweringError(msg) from error


def _staging_folder(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder beside ``path``, on the same file system, which goes when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)


def describe_package(path: Path, manifest: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Add the temporal program, and ``manifest`` with this machine and the checksums of all files.

    Args:
        path: The package.
        manifest: The other fields of a :class:`PackageManifest`, as JSON values.
        files: The files of the temporal program, by name.
    """
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        for name, data in files.items():
            archive.writestr(f"{root}/{TEMPORAL}/{name}", data)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **manifest,
        "machine": Machine.here().to_json(),
        "members": record_checksums(path),
    }
    # Through JSON, as it will be read: what could not be loaded is refused now.
    text = json.dumps(described)
    PackageManifest.from_bytes(text.encode())
    # Last: whatever has a description is complete.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{root}/{ABOUT}", text)


def is_package(path: Path) -> bool:
    """Whether the file at ``path`` says that it is a package of ours; what it says is not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/{ABOUT}") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error):
        return False


def load_models(path: Path) -> dict[str, Callable[..., Any]]:
    """What :func:`compile_package` compiled, by name."""
    return dict(load_pt2(str(path)).aoti_runners)


@dataclass(frozen=True)
class Package:
    """What was in a package.

    Attributes:
        models: Its compiled programs by name.
        manifest: What :func:`describe_package` wrote.
        temporal: Its temporal program; None where the block is compiled.
    """

    models: dict[str, Callable[..., Any]]
    manifest: PackageManifest
    temporal: TemporalProgram | None


def load_package(path: Path, unknown: UnknownTimestep | None = None) -> Package:
    """Load a package.

    Args:
        path: The file.
        unknown: What a timestep outside its table does; None leaves it as it was lowered.

    A package is compiled code: trust it as you trust a program. What it says of itself, and of the machine that it was
    compiled for, and the checksums of all its files are checked before any of that code is loaded.

    Raises:
        ArtefactError: The file is missing, damaged, not a package of ours, or compiled for another machine or torch.
    """
    if path.is_dir():
        msg = f"{path} is a folder and no package: an artefact is lowered with tfmq_fx.lower(tfmq_fx.load(path))"
        raise ArtefactError(msg)
    if not path.is_file():
        msg = f"there is no package at {path}; make one with lower(program, backend='aot', path=...)"
        raise ArtefactError(msg)
    try:
        manifest = PackageManifest.from_bytes(_description(path))
    except ArtefactError as error:
        msg = f"{path} is not a package of tfmq_fx, or it is damaged: {error}"
        raise ArtefactError(msg) from error
    if reason := Machine.here().lacks(manifest.machine):
        msg = f"{path} was compiled for {reason}; compile the program again here, from its artefact"
        raise ArtefactError(msg)
    check_members(path, manifest.members, ABOUT)
    try:
        temporal = _temporal_program(path, manifest, unknown)
    except ArtefactError as error:
        msg = f"{path} is not a package of tfmq_fx, or it is damaged: {error}"
        raise ArtefactError(msg) from error
    try:
        return Package(load_models(path), manifest, temporal)
    except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        msg = f"{path} is not a package of tfmq_fx, or it is damaged ({type(error).__name__}); compile it again"
        raise ArtefactError(msg) from error


def _temporal_program(path: Path, manifest: PackageManifest, unknown: UnknownTimestep | None) -> TemporalProgram | None:
    """The temporal program, which is data and checked as an artefact is."""
    if manifest.temporal is None:
        return None
    stored = StoredTemporalProgram.from_json(manifest.temporal)
    files = {name: bytearray(_member(path, f"{TEMPORAL}/{name}", size)) for name, size in stored.sizes.items()}
    timesteps = None if manifest.timesteps is None else torch.tensor(manifest.timesteps, dtype=torch.float64)
    policy: Any = unknown or manifest.unknown_timestep
    return stored.load(files, timesteps, policy)


def _description(path: Path) -> bytes:
    """What a package says of itself, never more than such a text has."""
    return _member(path, ABOUT, MOST_BYTES)


def _member(path: Path, name: str, size: int) -> bytes:
    """A file of the archive; one byte more than ``size`` at the most."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member for member in archive.namelist() if member.endswith(f"/{name}")]
            if len(names) == 1:
                with archive.open(names[0]) as file:
                    return file.read(size + 1)
    except UNREADABLE as error:
        msg = f"its archive cannot be read ({type(error).__name__}); compile it again"
        raise ArtefactError(msg) from error
    what = "descriptions" if name == ABOUT else f"files {name}"
    msg = f"it has {len(names)} {what} instead of one; compile it again"
    raise ArtefactError(msg)
