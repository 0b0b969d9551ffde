"""The ahead-of-time backend: an AOTInductor package that needs neither the model's source nor a compiler."""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch.export import ExportedProgram

from tfmq_fx._torch.core import load_pt2, package_aoti
from tfmq_fx.errors import ArtefactError, LoweringError
from tfmq_fx.lowering.backends.aot.machine import Machine
from tfmq_fx.lowering.backends.aot.manifest import FORMAT, FORMAT_VERSION, MOST_BYTES, PackageManifest
from tfmq_fx.lowering.backends.inductor.compiler import freezing
from tfmq_fx.lowering.backends.inductor.kernels import KernelCounter

__all__ = ["check_package_path", "compile_package", "describe_package", "is_package", "load_models", "load_package"]

ABOUT = "extra/tfmq_fx.json"


@torch.no_grad()
def compile_package(programs: Mapping[str, ExportedProgram], path: Path) -> KernelCounter:
    """Compile programs with frozen weights into the package ``path`` (``.pt2``).

    Args:
        programs: Exported q/dq graphs by the name that they are loaded under.
        path: Where the package goes.

    Returns:
        The integer kernels in it.
    """
    compiled, total = {}, KernelCounter()
    for name, program in programs.items():
        counter = KernelCounter()
        assert program.example_inputs is not None
        # The counter is not among the options: those are copied, and a copy would do the counting.
        with freezing(counter):
            files = torch._inductor.aot_compile(
                program.module(check_guards=False),
                *program.example_inputs,
                options={"aot_inductor.package": True, "freezing": True},
            )
        assert isinstance(files, list)
        compiled[name] = files
        total.counts += counter.counts
    path.parent.mkdir(parents=True, exist_ok=True)
    package_aoti(str(path), compiled)
    return total


def check_package_path(path: Path) -> None:
    """Find out whether a package can be written to ``path`` before minutes of compiling.

    Raises:
        LoweringError: It is a folder, or its folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        msg = f"the package {path} cannot be written: {error.strerror or error}; choose another path"
        raise LoweringError(msg) from error
    if path.is_dir():
        msg = f"the package {path} cannot be written: a folder is there; choose another path"
        raise LoweringError(msg)


def describe_package(path: Path, manifest: dict[str, Any]) -> None:
    """Add ``manifest`` (the fields of a :class:`PackageManifest`, JSON values) and this machine as a file."""
    described = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "machine": Machine.here().to_json()}
    # Through JSON, as it will be read: what could not be loaded is refused now.
    text = json.dumps(described)
    PackageManifest.from_bytes(text.encode())
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
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


def load_package(path: Path) -> tuple[dict[str, Callable[..., Any]], dict[str, Any]]:
    """Load a package; return its compiled programs by name, and what :func:`describe_package` wrote.

    A package is compiled code: trust it as you trust a program. What it says of itself, and of the machine that it was
    compiled for, is checked before any of that code is loaded.

    Raises:
        ArtefactError: The file is missing, not a package of ours, or compiled for another machine or torch.
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
    try:
        return load_models(path), manifest.to_json()
    except (KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        msg = f"{path} is not a package of tfmq_fx, or it is damaged ({type(error).__name__}); compile it again"
        raise ArtefactError(msg) from error


def _description(path: Path) -> bytes:
    """What a package says of itself, never more than such a text has."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{ABOUT}")]
            if len(names) == 1:
                with archive.open(names[0]) as file:
                    return file.read(MOST_BYTES + 1)
    except (EOFError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        msg = f"its archive cannot be read ({type(error).__name__}); compile it again"
        raise ArtefactError(msg) from error
    msg = f"it has {len(names)} descriptions instead of one; compile it again"
    raise ArtefactError(msg)
