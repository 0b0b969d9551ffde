"""Fake tensors, dispatch, and where the values of a tensor lie."""

from __future__ import annotations

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "ConstantSource",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "depends_on_data",
    "enable_python_dispatcher",
    "has_memory",
    "storage_id",
]


def depends_on_data(size: SymInt) -> bool:
    """Whether a symbolic size is known only from values that a tensor holds, as the number of its nonzeros is."""
    return bool(free_unbacked_symbols(size))


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values lie where its pointer says; not where it only stands for another tensor."""
    if torch._is_functional_tensor(tensor):  # it has a pointer, to nothing
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def storage_id(tensor: Tensor) -> int:
    """What tells the storages of tensors apart, those of fake tensors included, which have no pointer."""
    return int(tensor.untyped_storage()._cdata)
