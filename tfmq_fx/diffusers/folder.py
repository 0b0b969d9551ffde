"""The folder of a quantized model: diffusers' ``config.json`` beside an artefact of ours.

::

    config.json                             the model's configuration, and what it was quantized with
    diffusion_pytorch_model.safetensors     no tensors: the file that from_pretrained looks for
    manifest.json                           the artefact, which is data and checked as tfmq_fx.load does
    tensors.safetensors
    graph.json.gz
    denoiser.<program>.<precision>.pt2      compiled code, where it was asked for
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tfmq_fx.artefact.folder import check_target
from tfmq_fx.artefact.layout import FILES, MANIFEST, PREVIOUS, is_artefact
from tfmq_fx.artefact.load import load
from tfmq_fx.artefact.paths import path_of
from tfmq_fx.artefact.save import save
from tfmq_fx.errors import ArtefactError
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["load_program", "package_path", "save_model"]

#: A safetensors file without tensors has a header of some dozens of bytes.
MOST_STUB_BYTES = 4096
CONFIG = "config.json"


def save_model(model: Any, program: QuantizedProgram, path: str | os.PathLike[str], variant: str | None = None) -> None:
    """Write a quantized model.

    Args:
        model: The model, whose configuration is written.
        program: What it computes with.
        path: The folder: a model that was saved so before, an empty one, or nothing yet.
        variant: Part of the name of the file that ``from_pretrained`` looks for.

    Raises:
        ArtefactError: The folder holds something else, such as a float model, or cannot be written.
    """
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

    folder = path_of(path, "a model")
    check_target(folder)
    save(program, folder)
    name = Path(SAFETENSORS_WEIGHTS_NAME)
    stub = folder / (name if variant is None else f"{name.stem}.{variant}{name.suffix}")
    part = folder / f".{stub.name}.part"
    try:
        save_file({}, part, metadata={"format": "pt", "weights": f"in the artefact of tfmq_fx: {MANIFEST}"})
        part.replace(stub)
        if (folder / CONFIG).is_symlink():
            (folder / CONFIG).unlink()  # what it leads to is not ours
        model.save_config(folder)
    except OSError as error:
        msg = f"the model could not be written to {folder}: {error.strerror or error}; save it again"
        raise ArtefactError(msg) from error


def load_program(checkpoint_files: Sequence[Any], keys: Sequence[str]) -> tuple[Path, QuantizedProgram]:
    """The folder of a quantized model and its program, checked before anything of it is used.

    Args:
        checkpoint_files: The weights that diffusers found.
        keys: The names of the tensors in them.

    Raises:
        ArtefactError: The artefact is missing, foreign, truncated or changed, or a file of it is a link.
    """
    stub = Path(checkpoint_files[0])
    folder = stub.parent
    files = (CONFIG, *FILES, *PREVIOUS.values())
    if linked := [path for path in (stub, *(folder / name for name in files)) if path.is_symlink()]:
        msg = (
            f"{linked[0]} is a link: copy the file itself there (from the Hub, with "
            "huggingface_hub.snapshot_download(..., local_dir=...))"
        )
        raise ArtefactError(msg)
    if len(checkpoint_files) != 1 or stub.suffix != ".safetensors" or keys or stub.stat().st_size > MOST_STUB_BYTES:
        msg = (
            f"{folder} says that it holds a quantized model of tfmq_fx, and has weights in {stub.name}, which such a "
            "model has in its artefact; copy or save it again"
        )
        raise ArtefactError(msg)
    if not is_artefact(folder):
        msg = (
            f"{folder} is incomplete: it has no {MANIFEST} of tfmq_fx, with which the weights are; copy the whole "
            "folder again (from the Hub, with huggingface_hub.snapshot_download), or save the model again"
        )
        raise ArtefactError(msg)
    return folder, load(folder)


def package_path(folder: Path, precision: str) -> Path:
    """Where the compiled code of the program in ``folder`` lies: another program there has another name.

    Args:
        folder: The folder of the model.
        precision: What passes between integer kernels.
    """
    # The manifest has the checksums of all that the program is.
    program = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    return folder / f"denoiser.{program}.{precision}.pt2"
