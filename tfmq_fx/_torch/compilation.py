"""Errors and settings of torch's compilers, and the packages that they write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.exc
import torch._inductor
import torch._inductor.config
import torch.fx.experimental._config
from torch import fx
from torch._inductor.package.package import package_aoti
from torch.export.pt2_archive._package import load_pt2

__all__ = [
    "CompilerError",
    "ExportUserError",
    "compile_to_files",
    "constant_floats",
    "freeze_weights",
    "load_pt2",
    "no_special_batch_sizes",
    "package_aoti",
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


@contextlib.contextmanager
def freeze_weights(after_grad: Callable[[fx.Graph], None]) -> Iterator[None]:
    """Let Inductor freeze weights, and call ``after_grad`` with each graph that it has finished with."""
    with torch._inductor.config.patch(freezing=True, post_grad_custom_post_pass=after_grad):
        yield


def compile_to_files(module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
    """Compile an exported program's module ahead of time; :func:`package_aoti` puts the files into a package."""
    files = torch._inductor.aot_compile(module, *inputs, options=dict(options))
    assert isinstance(files, list)  # with the option aot_inductor.package, which every caller gives
    return files
