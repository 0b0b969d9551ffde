"""What a quantized program can be lowered to: every module and folder here that has a ``BACKEND`` is one.

``backend`` says what a backend is; ``registry`` finds backends: those here, those that installed packages declare as
entry points, and those that were registered by a call. The names below are all that a backend of one's own is written
with; each is imported when it is first used, so that importing this imports no backend, and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfmq_fx.lowering.backends.backend import Backend, CompilerBackend
    from tfmq_fx.lowering.backends.compiled import CompiledGraphs, GraphToCompile
    from tfmq_fx.lowering.backends.registry import (
        available_backends,
        backend_names,
        find_backend,
        register_backend,
        unregister_backend,
    )
    from tfmq_fx.lowering.options import BackendSupport
    from tfmq_fx.lowering.report.matching import KernelsByModule, KernelsByNode, NoKernels

__all__ = [
    "Backend",
    "BackendSupport",
    "CompiledGraphs",
    "CompilerBackend",
    "GraphToCompile",
    "KernelsByModule",
    "KernelsByNode",
    "NoKernels",
    "available_backends",
    "backend_names",
    "find_backend",
    "register_backend",
    "unregister_backend",
]

_MODULES = {
    "backends.backend": ("Backend", "CompilerBackend"),
    "backends.compiled": ("CompiledGraphs", "GraphToCompile"),
    "backends.registry": (
        "available_backends",
        "backend_names",
        "find_backend",
        "register_backend",
        "unregister_backend",
    ),
    "options": ("BackendSupport",),
    "report.matching": ("KernelsByModule", "KernelsByNode", "NoKernels"),
}
_MODULE_OF = {name: f"tfmq_fx.lowering.{module}" for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker that saw this function would take any name for an attribute

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name not in _MODULE_OF:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """What is there and what will be imported when it is asked for."""
    return sorted({*globals(), *__all__})
