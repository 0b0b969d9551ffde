"""State on disk after every unit, so that an interrupted reconstruction goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tfmq_fx.errors import ReconstructionError
from tfmq_fx.frontend.tensors import contiguous
from tfmq_fx.reconstruction.report import UnitResult

__all__ = ["Checkpoint", "fingerprint"]

PLAN = "plan.json"


def fingerprint(plain: Any, tensors: Iterable[Tensor]) -> str:
    """A hash of everything that decides the outcome: plain JSON values, weights and calibration data."""
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(contiguous(tensor.cpu()).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoint:
    """One file per finished unit in a folder; a file is complete or not there.

    Args:
        folder: The folder; None keeps nothing.
        key: The :func:`fingerprint` of the run.

    Raises:
        ReconstructionError: The folder holds the state of another run, or something else.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder = folder
        if folder is None:
            return
        plan = folder / PLAN
        if plan.is_file():
            try:
                stored = json.loads(plan.read_text(encoding="utf-8")).get("fingerprint")
            except (ValueError, AttributeError):
                stored = None
            if stored != key:
                msg = (
                    f"{folder} holds the state of another reconstruction (other weights, calibration data, code or "
                    "configuration); remove it to start over, or name another directory"
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
        self._write(PLAN, json.dumps({"fingerprint": key}).encode())

    def load(self, index: int) -> tuple[UnitResult, dict[str, Tensor]] | None:
        """The result and the state of a finished unit, or None.

        Raises:
            ReconstructionError: Its file cannot be read.
        """
        path = None if self.folder is None else self.folder / _name(index)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                result = UnitResult(**json.loads(file.metadata()["result"]))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            msg = f"the state of a finished unit in {path} cannot be read; remove that file to train the unit again"
            raise ReconstructionError(msg) from error
        return result, state

    def save(self, index: int, result: UnitResult, state: dict[str, Tensor]) -> None:
        """Keep a finished unit.

        Raises:
            ReconstructionError: It cannot be written.
        """
        if self.folder is not None:
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            self._write(_name(index), save(tensors, {"result": json.dumps(dataclasses.asdict(result))}))

    def _write(self, name: str, content: bytes) -> None:
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


def _name(index: int) -> str:
    return f"unit-{index:04d}.safetensors"
