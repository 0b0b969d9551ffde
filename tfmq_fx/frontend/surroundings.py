"""Work in plain surroundings, whatever the caller has switched on around the call, and in evaluation mode.

Autocast computes a graph in another dtype than it says, another default dtype or device changes what constants become,
and tensors that are made in inference mode can neither be trained nor written to later.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from tfmq_fx._torch.exclusion import one_at_a_time

__all__ = ["evaluation_mode", "in_plain_surroundings", "pipeline_stage", "plain_surroundings"]

P = ParamSpec("P")
R = TypeVar("R")

#: The devices whose autocast reaches what we compute.
AUTOCAST = "cpu"


class _DefaultDtype:
    """float32 as the default dtype, which threads share: from the first call that needs it until the last is done."""

    def __init__(self) -> None:
        self.calls = 0
        self._before = torch.float32
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls == 1:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.calls -= 1
            if self.calls == 0:
                torch.set_default_dtype(self._before)


_default_dtype = _DefaultDtype()


def _are_plain() -> bool:
    return (
        not _default_dtype.calls  # else it is float32 because of another thread, which may be done before we are
        and torch.get_default_dtype() is torch.float32
        and not torch.is_autocast_enabled(AUTOCAST)
        and not torch.is_inference_mode_enabled()
        and torch.get_default_device().type == "cpu"
    )


@contextlib.contextmanager
def plain_surroundings() -> Iterator[None]:
    """Without autocast and inference mode, with float32 and the CPU as defaults; as it was before, afterwards."""
    # The context of a device goes through every call of torch, so it is entered only where it is needed.
    on_another_device = torch.get_default_device().type != "cpu"
    device: contextlib.AbstractContextManager[object] = (
        torch.device("cpu") if on_another_device else contextlib.nullcontext()
    )
    with torch.inference_mode(False), torch.autocast(AUTOCAST, enabled=False), device, _default_dtype:
        yield


def in_plain_surroundings(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` run in :func:`plain_surroundings`; where they are plain already it is called as it is."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if _are_plain():
            return function(*args, **kwargs)
        with plain_surroundings():
            return function(*args, **kwargs)

    return wrapped


def pipeline_stage(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` run in :func:`plain_surroundings`, one such call in the process at a time.

    What it calls itself, stages too, runs in the same turn. A call of a program or denoiser is no stage, and waits for
    none.
    """
    # The turn first: the default dtype, which surroundings set, belongs to the process too.
    return one_at_a_time(in_plain_surroundings(function))


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into ``eval()``; afterwards every submodule has the mode that it had, error or not."""
    training = {module: module.training for module in model.modules()}
    with contextlib.suppress(NotImplementedError):  # a graph of torch.export has no other mode than it was exported in
        model.eval()
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
