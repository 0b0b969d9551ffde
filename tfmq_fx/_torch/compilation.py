"""Errors and settings of torch's compilers that need no compiler: Inductor is another module's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch._dynamo
import torch._dynamo.exc
import torch.fx.experimental._config
from torch.export.pt2_archive._package import load_pt2

__all__ = [
    "CompilerError",
    "ExportUserError",
    "constant_floats",
    "load_pt2",
    "no_special_batch_sizes",
]

#: What every failure of ``torch.compile`` and of AOTInductor is.
CompilerError = torch._dynamo.exc.TorchDynamoException
#: What torch.export raises about a model that it cannot take as it is.
ExportUserError = torch._dynamo.exc.UserError


@contextlib.contextmanager
def constant_floats() -> Iterator[None]:
    """Compile Python floats into the code: otherwise module constants become tensors that loops read."""
    with torch._dynamo.config.patch(specialize_float=True):
        yield


@contextlib.contextmanager
def no_special_batch_sizes() -> Iterator[None]:
    """Compile symbolic sizes without the special case for 0 and 1."""
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
        yield
