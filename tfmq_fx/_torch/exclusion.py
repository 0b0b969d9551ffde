"""One call at a time in the whole process, for what works on state that torch keeps per process.

Tracing of ``torch.export``, its deserializer, and fake tensors that two graphs share keep state of the process: two
threads there at once leave it broken for good.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["exclusive", "one_at_a_time"]

P = ParamSpec("P")
R = TypeVar("R")

#: One lock for everything: what is called inside another such call, in the same thread, goes on.
_lock = threading.RLock()


def exclusive() -> contextlib.AbstractContextManager[object]:
    """A context in which no other thread is in one of these."""
    return _lock


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Let ``function`` wait while another thread is in one that is marked so."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive():
            return function(*args, **kwargs)

    return wrapped


def _renew() -> None:
    """In a forked process the thread that held the lock is not there to give it back."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_renew)
