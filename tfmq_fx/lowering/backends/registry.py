"""Find backends by name: ours, those of installed packages, and those registered by a call.

Ours are the modules of this folder with a backend as ``BACKEND``, each called like it; others are helpers. Another
package declares one as an entry point, so that installing it is all there is to do::

    [project.entry-points."tfmq_fx.backends"]
    toy = "toy_package.backend:BACKEND"

Listing names imports no backend.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from tfmq_fx.errors import LoweringError

if TYPE_CHECKING:
    # Whoever lists names, such as the command line, does not wait for torch.
    from tfmq_fx.lowering.backends.backend import Backend

__all__ = [
    "ENTRY_POINTS",
    "available_backends",
    "backend_names",
    "find_backend",
    "find_package_backend",
    "register_backend",
    "unregister_backend",
]

#: The group of entry points that other packages declare their backends in.
ENTRY_POINTS = "tfmq_fx.backends"
#: The modules of this folder that are no backends, though they speak of them.
NO_BACKENDS = ("backend", "registry")
#: Whose errors explain a path that is no backend's package.
DEFAULT_PACKAGE_BACKEND = "aot"

_registered: dict[str, Backend] = {}


def register_backend(backend: Backend, *, override: bool = False) -> None:
    """Make ``backend`` known under its name in this process.

    Args:
        backend: The backend.
        override: Whether it may take the place of one of that name.

    Raises:
        LoweringError: It is no backend, lacks a name, title or summary, or there is one of that name.
    """
    _check_backend(backend, "register_backend")
    if not override and backend.name in backend_names():
        msg = f"there is a backend {backend.name!r} already; register it with override=True, or under another name"
        raise LoweringError(msg)
    _registered[backend.name] = backend


def unregister_backend(name: str) -> None:
    """Take back :func:`register_backend`; one of ours of that name is there again.

    Raises:
        LoweringError: No backend was registered under ``name`` by a call.
    """
    if name not in _registered:
        msg = f"no backend {name!r} was registered with register_backend"
        raise LoweringError(msg)
    del _registered[name]


def backend_names() -> tuple[str, ...]:
    """The names of all backends, in alphabetical order, whether or not what they need is installed."""
    return tuple(sorted({*_registered, *_own_names(), *(entry.name for entry in _entry_points())}))


def available_backends() -> tuple[str, ...]:
    """The names of the backends whose packages are installed."""
    names = []
    for name in backend_names():
        try:
            missing = find_backend(name).missing_packages()
        except LoweringError:  # it cannot be imported; asking for it says why
            continue
        if not missing:
            names.append(name)
    return tuple(names)


def find_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        LoweringError: There is none; the message lists those that there are. Or another package's cannot be imported.
    """
    if name not in backend_names():
        msg = f"backend={name!r} is not supported: use one of {', '.join(map(repr, backend_names()))}"
        raise LoweringError(msg)
    if name in _registered:
        return _registered[name]
    entries = [entry for entry in _entry_points() if entry.name == name]
    own = [name] if name in _own_names() else []
    if len(entries) + len(own) > 1:
        sources = [*("tfmq_fx" for _ in own), *(entry.value for entry in entries)]
        msg = f"several packages have a backend {name!r} ({', '.join(sources)}); uninstall all but one"
        raise LoweringError(msg)
    return _load_own(name) if own else _load_entry_point(entries[0])


def find_package_backend(path: Path) -> Backend:
    """The backend that wrote the package at ``path``; where none says so, the one that explains what is wrong with it.

    Args:
        path: The file.
    """
    default = find_backend(DEFAULT_PACKAGE_BACKEND)
    if default.recognizes(path):
        return default
    others = (find_backend(name) for name in available_backends() if name != DEFAULT_PACKAGE_BACKEND)
    return next((backend for backend in others if backend.recognizes(path)), default)


def _own_names() -> list[str]:
    """The modules beside this one that are backends; they are read, not imported, since engines import slowly."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return [module.name for module in modules if module.name not in NO_BACKENDS and _names_a_backend(module.name)]


def _names_a_backend(name: str) -> bool:
    """Whether a module of this folder has the word ``BACKEND``; one that has not is a helper of others."""
    path = Path(__file__).with_name(name)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return not source.exists() or re.search(r"\bBACKEND\b", source.read_text(encoding="utf-8")) is not None


def _load_own(name: str) -> Backend:
    module = f"{__package__}.{name}"
    try:
        loaded = importlib.import_module(module).BACKEND
    except Exception as error:
        msg = f"backend={name!r} cannot be imported from {module}: {error}"
        raise LoweringError(msg) from error
    return _check_backend(loaded, f"{module}:BACKEND", name)


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINTS))


def _load_entry_point(entry: EntryPoint) -> Backend:
    try:
        loaded = entry.load()
    except Exception as error:
        msg = f"backend={entry.name!r} of another package cannot be imported from {entry.value}: {error}"
        raise LoweringError(msg) from error
    return _check_backend(loaded, entry.value, entry.name)


def _check_backend(value: object, source: str, name: str | None = None) -> Backend:
    """``value``, which is a backend of this name."""
    from tfmq_fx.lowering.backends.backend import Backend
    from tfmq_fx.lowering.backends.checks import check_attributes

    if not isinstance(value, Backend):
        kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        msg = f"{source} is {kind} instead of a Backend object"
        raise LoweringError(msg)
    check_attributes(value, source)
    if name is not None and value.name != name:
        msg = f"{source} is declared as {name!r}, but its name is {value.name!r}; give both the same name"
        raise LoweringError(msg)
    return value
