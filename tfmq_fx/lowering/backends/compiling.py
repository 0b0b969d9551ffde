"""Compile a graph with one of the backends."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import fx

from tfmq_fx._torch.compilation import CompilerError
from tfmq_fx._torch.graphs import output_structure
from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.aot import compile_package, export_graph, load_models
from tfmq_fx.lowering.backends.engines import ENGINES, compile_engine
from tfmq_fx.lowering.backends.inductor import compile_inductor
from tfmq_fx.lowering.backends.native import on_native_kernels
from tfmq_fx.lowering.examples import EXAMPLE_BATCH
from tfmq_fx.lowering.run.staged import StagedProgram, stage_inputs
from tfmq_fx.lowering.stages import StagedGraph

__all__ = ["WHOLE", "Kernels", "compile_graph", "compile_stages", "stage_name"]

#: Integer kernels: how many by module path, or the nodes that run on them; None for the reference, which has none.
Kernels = Counter[str] | set[str] | None
#: What a package calls a program that was not cut into stages.
WHOLE = "model"


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
    with _said_in_a_sentence():
        if backend == "inductor":
            run, counter = compile_inductor(reference)
            return run, counter.found
        if backend == "aot":
            package = Path(str(path))
            counter = compile_package({WHOLE: export_graph(reference, args, kwargs, max_batch)}, package)
            return load_models(package)[WHOLE], counter.found
    return reference, None


def compile_stages(
    lowered: fx.GraphModule,
    staged: StagedGraph,
    backend: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: str | Path | None,
    max_batch: int | None,
    precision: str | None,
) -> tuple[Callable[..., Any], Kernels]:
    """Compile each stage by itself; return the callable and the integer kernels of all of them."""
    inputs = stage_inputs(staged, args, kwargs)
    graphs = [on_native_kernels(graph_module, precision) for graph_module in staged.graph_modules]
    kernels = Counter[str]()
    runs: list[Callable[..., Any]] = []
    with _said_in_a_sentence():
        if backend == "aot":
            package = Path(str(path))
            examples = zip(graphs, inputs, strict=True)
            programs = [export_graph(graph_module, given, {}, max_batch) for graph_module, given in examples]
            kernels = compile_package({stage_name(n): program for n, program in enumerate(programs)}, package).found
            models = load_models(package)
            runs = [models[stage_name(n)] for n in range(len(programs))]
        else:
            for graph_module in graphs:
                run, counter = compile_inductor(graph_module)
                runs.append(run)
                kernels += counter.found
    return StagedProgram(staged.layout, output_structure(lowered.graph), runs), kernels


def stage_name(number: int) -> str:
    """What a package calls a stage."""
    return f"stage_{number}"


@contextlib.contextmanager
def _said_in_a_sentence() -> Iterator[None]:
    """Turn what the compiler raises into an error that says what to do."""
    try:
        yield
    except CompilerError as error:
        cause = getattr(error, "inner_exception", error)
        first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        msg = (
            f"Inductor could not compile this program ({first.strip()}); capture the model with dynamic_batch=False, "
            "which is easier to compile, or run it with backend='reference'"
        )
        raise LoweringError(msg) from error
