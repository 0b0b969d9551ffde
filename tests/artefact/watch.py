"""Load an artefact under guard: what it opens, imports and runs is seen, its memory and its time are bounded."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import tfmq_fx
from tfmq_fx import ArtefactError
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["load_guarded", "watched"]

GIB = 2**30
SECONDS = 60
#: What Python raises an audit event for, and no artefact may cause.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "os.putenv",
             "shutil.", "subprocess.", "socket.",
             "ctypes.", "pickle.", "marshal.", "webbrowser.", "urllib.", "sqlite3.")  # fmt: skip
#: Modules that torch imports when it first needs them.
LAZY = ("torch", "sympy", "mpmath", "encodings", "tfmq_fx")

_seen: list[str] | None = None
_folder = ""


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        path, mode = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else str(args[0]), str(args[1])
        # A traceback reads the lines of Python's own files.
        source = path.endswith(".py") and "r" in mode
        if not (path.startswith(_folder) and "r" in mode) and not source:
            _seen.append(f"open {path} ({mode})")
    elif event == "import":
        name = str(args[0])
        if name.partition(".")[0] not in LAZY and name not in sys.modules:
            _seen.append(f"import {name}")
    elif event.startswith(FORBIDDEN):
        _seen.append(f"{event} {args}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What happens inside the block that loading an artefact at ``folder`` has no need for."""
    global _seen, _folder
    seen: list[str] = []
    _seen, _folder = seen, str(folder)
    try:
        yield seen
    finally:
        _seen = None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """At most a gibibyte more than there was, and a minute."""

    def stop(*_: object) -> None:
        msg = f"it took more than {SECONDS} s"
        raise TimeoutError(msg)

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIB, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def load_guarded(folder: Path) -> QuantizedProgram | ArtefactError:
    """Load an artefact; what it raised when it is refused. Any other exception, or what it may not do, fails."""
    loaded: QuantizedProgram | ArtefactError
    with _bounded(), watched(folder) as seen:
        try:
            loaded = tfmq_fx.load(folder)
        except ArtefactError as error:
            loaded = error
    assert not seen, seen
    if isinstance(loaded, ArtefactError):
        text = str(loaded)
        assert "\n" not in text and len(text) < 1000, text
    return loaded
