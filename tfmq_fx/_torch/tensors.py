"""Fake tensors, dispatch, and where the values of a tensor lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "ConstantSource",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "enable_python_dispatcher",
    "has_memory",
    "storage_id",
]


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
