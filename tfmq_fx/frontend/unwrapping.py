"""Take off what others put around a model: compilers and data parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tfmq_fx._torch.core import OptimizedModule

__all__ = ["uncompiled_parts", "unwrap"]

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: Any) -> Any:
    """The model itself, where ``model`` is what ``torch.compile``, ``DataParallel`` or DDP made of it."""
    while isinstance(model, (OptimizedModule, *WRAPPERS)):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


@contextlib.contextmanager
def uncompiled_parts(model: nn.Module) -> Iterator[None]:
    """Run with the compiled and the parallel submodules of ``model`` as they were before; put them back afterwards.

    The names of a graph's weights are then those of the model, and a submodule's own compilation is not traced.
    """
    wrapped = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if isinstance(child, (OptimizedModule, *WRAPPERS))
    ]
    compiled = [(module, module._compiled_call_impl) for module in model.modules()]
    for parent, name, child in wrapped:
        parent._modules[name] = unwrap(child)
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
        for module, call in compiled:
            module._compiled_call_impl = call
