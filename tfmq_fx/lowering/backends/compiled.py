"""What a backend is given to compile, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.report.matching import IntegerKernels

__all__ = ["CompiledGraphs", "GraphToCompile", "checked_compiled"]


@dataclass(frozen=True)
class GraphToCompile:
    """A graph, and inputs that it can be called with.

    Attributes:
        name: ``"model"``, or the name of a stage.
        graph_module: The q/dq graph; it is not to be changed. Sizes that are symbolic in its ``meta["val"]`` are the
            batch, which may be any.
        args: Its example inputs.
        kwargs: Its example inputs by name.
    """

    name: str
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class CompiledGraphs:
    """What was compiled.

    Attributes:
        runs: One callable for each graph, called like it and returning what it returns.
        kernels: The integer kernels in all of them.
    """

    runs: tuple[Callable[..., Any], ...]
    kernels: IntegerKernels


def checked_compiled(compiled: Any, count: int, name: str) -> CompiledGraphs:
    """What a backend called ``name`` compiled from ``count`` graphs.

    Raises:
        LoweringError: It is something else than it promises.
    """
    start = f"backend={name!r}: its compile_graphs returned"
    if not isinstance(compiled, CompiledGraphs):
        msg = f"{start} a {type(compiled).__name__} instead of CompiledGraphs"
        raise LoweringError(msg)
    runs: Any = compiled.runs
    if not isinstance(runs, (tuple, list)):
        msg = f"{start} a {type(runs).__name__} as runs instead of a tuple with one callable for each graph"
        raise LoweringError(msg)
    if len(runs) != count or not all(map(callable, runs)):
        msg = f"{start} {len(runs)} runs for {count} graphs; it must return one callable for each"
        raise LoweringError(msg)
    if not callable(getattr(compiled.kernels, "match", None)):
        msg = f"{start} {compiled.kernels!r} as kernels; where there are none, that is NoKernels(reason)"
        raise LoweringError(msg)
    return compiled
