"""Take off what others put around a model: compilers and data parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tfmq_fx._torch.modules import OptimizedModule, children_by_name, original_module, without_own_compilation

__all__ = ["uncompiled_parts", "unwrap"]

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: Any) -> Any:
    """The model itself, where ``model`` is what ``torch.compile``, ``DataParallel`` or DDP made of it."""
    while isinstance(model, (OptimizedModule, *WRAPPERS)):
        model = original_module(model) if isinstance(model, OptimizedModule) else model.module
    return model


@contextlib.contextmanager
def uncompiled_parts(model: nn.Module) -> Iterator[None]:
    """Run with the compiled and the parallel submodules of ``model`` as they were before; put them back afterwards.

    The names of a graph's weights are then those of the model, and a submodule's own compilation is not traced.
    """
    wrapped = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in children_by_name(parent).items()
        if isinstance(child, (OptimizedModule, *WRAPPERS))
    ]
    for parent, name, child in wrapped:
        children_by_name(parent)[name] = unwrap(child)
    try:
        with without_own_compilation(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parent, name, child in wrapped:
            children_by_name(parent)[name] = child
