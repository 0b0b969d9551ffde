"""The parts of a module as the dictionaries that hold them, in which one can be put in the place of another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

__all__ = [
    "GUARDS",
    "OptimizedModule",
    "children_by_name",
    "original_module",
    "tensors_by_name",
    "without_own_compilation",
]

#: The submodule that holds the guards of an exported program.
GUARDS = "_guards_fn"


def children_by_name(module: nn.Module) -> dict[str, nn.Module | None]:
    """The direct submodules of ``module``, by name: its own dictionary, each place of a shared one included."""
    return module._modules


def tensors_by_name(module: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    """The direct parameters and the direct buffers of ``module``, by name: its own dictionaries."""
    parameters: dict[str, Tensor | None] = module._parameters  # type: ignore[assignment]  # a dict is invariant
    return parameters, module._buffers


def original_module(compiled: OptimizedModule) -> nn.Module:
    """The module that ``torch.compile`` was called with."""
    return compiled._orig_mod


@contextlib.contextmanager
def without_own_compilation(model: nn.Module) -> Iterator[None]:
    """Run without what ``Module.compile`` compiled of ``model`` and its submodules."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules()]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
