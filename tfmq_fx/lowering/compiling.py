"""Compile a graph with one of the backends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import fx

from tfmq_fx._compat import CompilerError
from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.aot import compile_package, export_graph
from tfmq_fx.lowering.engines import ENGINES, compile_engine
from tfmq_fx.lowering.examples import EXAMPLE_BATCH
from tfmq_fx.lowering.inductor import compile_inductor
from tfmq_fx.lowering.native import on_native_kernels
from tfmq_fx.lowering.staged import StagedProgram
from tfmq_fx.lowering.stages import Stage

__all__ = ["Kernels", "compile_graph", "compile_stages"]

#: Integer kernels: how many by module path, or the nodes that run on them; None for the reference, which has none.
Kernels = Counter[str] | set[str] | None


def compile_graph(
    reference: fx.GraphModule,
    backend: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: str | Path | None,
    max_batch: int | None,
    precision: str | None,
) -> tuple[Callable[..., Any], Kernels]:
    """Compile; return the callable and its integer kernels."""
    if backend in ENGINES:
        return compile_engine(backend, reference, EXAMPLE_BATCH, precision)
    if backend in ("inductor", "aot"):
        reference = on_native_kernels(reference, precision)
    try:
        if backend == "inductor":
            run, counter = compile_inductor(reference, args, kwargs)
            return run, counter.found
        if backend == "aot":
            package = Path(str(path))
            counter = compile_package(export_graph(reference, args, kwargs, max_batch), package)
            return torch._inductor.aoti_load_package(str(package)), counter.found
    except CompilerError as error:
        cause = getattr(error, "inner_exception", error)
        first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        msg = (
            f"Inductor could not compile this program ({first.strip()}); capture the model with dynamic_batch=False, "
            "which is easier to compile, or run it with backend='reference'"
        )
        raise LoweringError(msg) from error
    return reference, None


def compile_stages(
    lowered: fx.GraphModule,
    stages: list[Stage],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    precision: str | None,
) -> tuple[Callable[..., Any], Kernels]:
    """Compile each stage by itself; return the callable and the integer kernels of all of them."""
    eager_run = StagedProgram(lowered, stages, [stage.graph_module for stage in stages])
    runs, kernels = [], Counter[str]()
    for stage, inputs in zip(stages, eager_run.example_inputs(args, kwargs), strict=True):
        run, found = compile_graph(stage.graph_module, "inductor", tuple(inputs), {}, None, None, precision)
        runs.append(run)
        kernels += Counter(found)
    return StagedProgram(lowered, stages, runs), kernels
