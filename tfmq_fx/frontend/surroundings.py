"""Work in plain surroundings, whatever the caller has switched on around the call, and in evaluation mode.

Autocast computes a graph in another dtype than it says, another default dtype or device changes what constants become,
and tensors that are made in inference mode can neither be trained nor written to later.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import nn

__all__ = ["evaluation_mode", "in_plain_surroundings", "plain_surroundings"]

P = ParamSpec("P")
R = TypeVar("R")

#: The devices whose autocast reaches what we compute.
AUTOCAST = "cpu"


def _are_plain() -> bool:
    return (
        torch.get_default_dtype() is torch.float32
        and not torch.is_autocast_enabled(AUTOCAST)
        and not torch.is_inference_mode_enabled()
        and torch.get_default_device().type == "cpu"
    )


@contextlib.contextmanager
def plain_surroundings() -> Iterator[None]:
    """Without autocast and inference mode, with float32 and the CPU as defaults; as it was before, afterwards."""
    dtype = torch.get_default_dtype()
    # The context of a device goes through every call of torch, so it is entered only where it is needed.
    on_another_device = torch.get_default_device().type != "cpu"
    device: contextlib.AbstractContextManager[object] = (
        torch.device("cpu") if on_another_device else contextlib.nullcontext()
    )
    with torch.inference_mode(False), torch.autocast(AUTOCAST, enabled=False), device:
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def in_plain_surroundings(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` run in :func:`plain_surroundings`; where they are plain already it is called as it is."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if _are_plain():
            return function(*args, **kwargs)
        with plain_surroundings():
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into ``eval()``; afterwards every submodule has the mode that it had, error or not."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
