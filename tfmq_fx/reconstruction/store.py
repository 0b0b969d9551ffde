"""Memory for cached activations: RAM up to a budget, memory-mapped files beyond it."""

from __future__ import annotations

import math
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from tfmq_fx.errors import ReconstructionError

__all__ = ["ActivationStore"]


class ActivationStore:
    """Hands out tensors and counts them until nobody holds them any more.

    A tensor that does not fit into the budget lies in a file of its own in ``folder``, which has no name
    any more by the time it is handed out: however the process ends, the file is gone with it.

    Args:
        budget: Bytes of RAM for cached activations.
        folder: Where to put files; the system's temporary folder by default.

    Attributes:
        in_memory: Bytes in RAM now.
        in_files: Bytes in files now.
        peak: Most bytes so far, both together.
        peak_in_files: Most bytes in files so far.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.in_memory = self.in_files = self.peak = self.peak_in_files = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor.

        Raises:
            ReconstructionError: The disk has no room for it.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self.in_memory + size <= self.budget or size == 0:
            tensor = torch.empty(shape, dtype=dtype)
            self.in_memory += size
            weakref.finalize(tensor.untyped_storage(), self._free_memory, size)
        else:
            tensor = self._map(count, dtype).view(shape)
            self.in_files += size
            weakref.finalize(tensor.untyped_storage(), self._free_file, size)
        self.peak = max(self.peak, self.in_memory + self.in_files)
        self.peak_in_files = max(self.peak_in_files, self.in_files)
        return tensor

    def _map(self, count: int, dtype: torch.dtype) -> Tensor:
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix="activations-", dir=self.folder) as file:
                # Claim the room now: writing into a mapping of a full disk would end the process.
                reserve(file.fileno(), count * dtype.itemsize)
                return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
        except (OSError, RuntimeError) as error:
            where = self.folder or tempfile.gettempdir()
            msg = (
                f"{count * dtype.itemsize / 2**30:.2f} GiB of activations do not fit into the memory budget of "
                f"{self.budget / 2**30:.2f} GiB nor onto the disk of {where}; raise cache_bytes, calibrate on "
                f"fewer samples, or give another directory ({error})"
            )
            raise ReconstructionError(msg) from error

    def _free_memory(self, size: int) -> None:
        self.in_memory -= size

    def _free_file(self, size: int) -> None:
        self.in_files -= size


def reserve(descriptor: int, size: int) -> None:
    """Make a file of ``size`` bytes whose blocks exist."""
    import os

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
