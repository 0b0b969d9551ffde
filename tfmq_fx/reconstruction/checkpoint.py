"""State on disk after every unit, so that an interrupted reconstruction goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tfmq_fx.errors import ReconstructionError
from tfmq_fx.frontend.tensors import contiguous
from tfmq_fx.reconstruction.report import UnitResult

__all__ = ["Checkpoint", "TrainingState", "fingerprint"]

PLAN = "plan.json"


def fingerprint(plain: Any, tensors: Iterable[Tensor] = ()) -> str:
    """A hash of a part of what decides the outcome: plain JSON values and tensors."""
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(contiguous(tensor.cpu()).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoint:
    """One file per finished unit in a folder; a file is complete or not there.

    Args:
        folder: The folder; None keeps nothing.
        fingerprints: The :func:`fingerprint` of each part of what decides the outcome, by the name of the part.

    Raises:
        ReconstructionError: The folder holds the state of another run, or something else.
    """

    def __init__(self, folder: Path | None, fingerprints: Mapping[str, str]) -> None:
        self.folder = folder
        if folder is None:
            return
        plan = folder / PLAN
        if plan.is_file():
            recorded = _recorded(plan)
            if not recorded:
                msg = f"{plan} cannot be read; remove {folder} to start over, or name another directory"
                raise ReconstructionError(msg)
            if different := [part for part, value in fingerprints.items() if recorded.get(part) != value]:
                msg = (
                    f"{folder} holds the state of another reconstruction, which differs in its "
                    f"{', '.join(different)}; remove it to start over, or name another directory"
                )
                raise ReconstructionError(msg)
            return
        # A run that was killed at its very start leaves a part of a plan.
        if folder.exists() and (
            not folder.is_dir() or any(not path.name.startswith(f".{PLAN}.") for path in folder.iterdir())
        ):
            msg = f"{folder} exists and holds something else than the state of a reconstruction; name another directory"
            raise ReconstructionError(msg)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"the directory {folder} cannot be made: {error.strerror}"
            raise ReconstructionError(msg) from error
        self.write(PLAN, json.dumps({"fingerprints": dict(fingerprints)}).encode())

    def load(self, index: int) -> tuple[UnitResult, dict[str, Tensor]] | None:
        """The result and the state of a finished unit, or None.

        Raises:
            ReconstructionError: Its file cannot be read.
        """
        path = None if self.folder is None else self.folder / _name(index)
        if path is None or not path.is_file():
            return None
        try:
            metadata, state = _read(path)
            return UnitResult(**json.loads(metadata["result"])), state
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            msg = f"the state of a finished unit in {path} cannot be read; remove that file to train the unit again"
            raise ReconstructionError(msg) from error

    def save(self, index: int, result: UnitResult, state: dict[str, Tensor]) -> None:
        """Keep a finished unit.

        Raises:
            ReconstructionError: It cannot be written.
        """
        if self.folder is not None:
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            self.write(_name(index), save(tensors, {"result": json.dumps(dataclasses.asdict(result))}))

    def write(self, name: str, content: bytes) -> None:
        """Put a file into the folder, whole or not at all.

        Raises:
            ReconstructionError: It cannot be written.
        """
        assert self.folder is not None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{name}.", delete=False) as file:
                part = Path(file.name)
                try:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                    part.replace(self.folder / name)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            msg = f"the state of reconstruction could not be written to {self.folder}: {error.strerror or error}"
            raise ReconstructionError(msg) from error


class TrainingState:
    """The state of a unit whose training takes long, while it lasts; a file like those of finished units.

    Args:
        checkpoint: Where it lies.
        index: The unit's number.
    """

    def __init__(self, checkpoint: Checkpoint, index: int) -> None:
        self.checkpoint, self.name = checkpoint, f"training-{index:04d}.safetensors"

    def load(self) -> dict[str, Tensor] | None:
        """What :meth:`save` kept last, or None.

        Raises:
            ReconstructionError: Its file cannot be read.
        """
        path = None if self.checkpoint.folder is None else self.checkpoint.folder / self.name
        if path is None or not path.is_file():
            return None
        try:
            return _read(path)[1]
        except (SafetensorError, OSError, ValueError) as error:
            msg = f"the state of a training in {path} cannot be read; remove that file to start the training again"
            raise ReconstructionError(msg) from error

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state in place of the one before.

        Raises:
            ReconstructionError: It cannot be written.
        """
        if self.checkpoint.folder is not None:
            self.checkpoint.write(self.name, save({name: tensor.contiguous() for name, tensor in state.items()}))

    def remove(self) -> None:
        """Drop it: the unit is finished, and kept as such."""
        if self.checkpoint.folder is not None:
            (self.checkpoint.folder / self.name).unlink(missing_ok=True)


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def _recorded(plan: Path) -> Mapping[str, Any]:
    """The fingerprints in the file of a plan; none where it is no such file."""
    try:
        recorded = json.loads(plan.read_text(encoding="utf-8"))["fingerprints"]
    except (ValueError, KeyError, TypeError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _name(index: int) -> str:
    return f"unit-{index:04d}.safetensors"
