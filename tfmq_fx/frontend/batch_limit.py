"""Whether a model computes the same above the largest batch that its export admits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tfmq_fx._torch import pytree
from tfmq_fx._torch.tensors import FakeTensorMode, TorchDispatchMode
from tfmq_fx.errors import CaptureError

__all__ = ["check_batch_limit"]

aten = torch.ops.aten

#: What copies or renames memory: diffusers' upsampler makes batches of 64 and more contiguous, which changes no value.
COPIES = (
    aten.clone, aten.contiguous, aten.copy_, aten._to_copy, aten.to, aten.detach, aten.alias, aten.view,
    aten._reshape_alias, aten._unsafe_view, aten.reshape, aten.empty_like, aten.lift_fresh_copy,
)  # fmt: skip

Operations = list[tuple[Any, tuple[float, ...]]]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Record which operators run, and the floats that they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.operations: Operations = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        # prim.* only ask a tensor what it is.
        if packet not in COPIES and func.namespace != "prim":
            leaves = pytree.tree_leaves((args, kwargs))
            self.operations.append((packet, tuple(leaf for leaf in leaves if isinstance(leaf, float))))
        return func(*args, **(kwargs or {}))


def check_batch_limit(
    model: nn.Module, arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]], limit: int
) -> None:
    """Raise where a batch of more than ``limit`` takes another way through the model's Python code.

    Such a batch is run in pieces of ``limit``, which gives the model's result only if every size takes the same way.
    The model runs twice on tensors without values, so this costs no memory.

    Args:
        model: The float model, in evaluation mode.
        arguments: Makes ``(args, kwargs)`` of a batch of that size, with tensors of any values.
        limit: The largest batch that was exported.

    Raises:
        CaptureError: It does.
    """
    try:
        within, beyond = (_operations(model, arguments, size) for size in (limit, limit + 1))
    except Exception as error:  # any code may fail without values; export itself has taken the model
        warnings.warn(
            f"{type(model).__name__} does not run without values ({type(error).__name__}), so nobody knows whether it "
            f"computes the same for batches above {limit}: compare one with the model",
            stacklevel=2,
        )
        return
    if within != beyond:
        msg = (
            f"{type(model).__name__} computes something else for batches above {limit} (a branch on the batch size), "
            "and a graph holds one of the two: make the batch fixed with dynamic_batch=False, or take the branch out"
        )
        raise CaptureError(msg)


def _operations(
    model: nn.Module, arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]], size: int
) -> Operations:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        args, kwargs = pytree.tree_map_only(torch.Tensor, fake.from_tensor, arguments(size))
        recorder = _Recorder()
        with recorder:
            model(*args, **kwargs)
    return recorder.operations
