"""Hold a pipeline to its promise, pass by pass, each on what the passes before it left."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx

from tfmq_fx.passes.base import Numerics, PassError
from tfmq_fx.passes.pipeline import Pipeline, pass_class

from .contract import assert_pass_contract

__all__ = ["assert_pipeline_contract"]


def assert_pipeline_contract(
    pipeline: Pipeline,
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    more_inputs: Sequence[Sequence[Any]] = (),
    rtol: float = 1e-3,
    atol: float = 1e-3,
    may_set: Mapping[str, Collection[str]] | None = None,
) -> tuple[str, ...]:
    """Check the contract of every pass of a pipeline, in order, on one graph.

    The pipelines that this one comes after run first. Then each pass is held to what it promises itself
    (``numerics``), which is at least what the pipeline promises, on the graph that the passes before it left.

    Args:
        pipeline: The pipeline.
        graph_module: The graph; it stays as it is.
        example_inputs: Positional inputs.
        more_inputs: Further ones, e.g. of another batch size.
        rtol: Relative tolerance of passes that promise results equal up to float rounding.
        atol: Absolute tolerance of them.
        may_set: By id, keys of ``node.meta`` that a pass is there to set on nodes that stay.

    Returns:
        The ids of the passes that changed the graph. A pass that refuses the graph ends the check.

    Raises:
        ContractViolation: A pass breaks its contract; a note names it.
    """
    working = copy.deepcopy(graph_module)
    fired: list[str] = []
    try:
        for earlier in _earlier(pipeline):
            earlier.run(working)
        for make in pipeline:
            kind = pass_class(make)
            try:
                result = assert_pass_contract(
                    make,
                    working,
                    example_inputs,
                    exact=kind.numerics is Numerics.EXACT,
                    rtol=rtol,
                    atol=math.inf if kind.numerics is Numerics.CHANGED else atol,
                    more_inputs=more_inputs,
                    may_set=(may_set or {}).get(kind.id, ()),
                )
            except AssertionError as error:
                error.add_note(f"{kind.id} in the pipeline {pipeline.name!r} promises: {kind.numerics}")
                raise
            working = result.graph_module
            fired += [kind.id] if result.modified else []
    except PassError:
        pass
    return tuple(fired)


def _earlier(pipeline: Pipeline) -> list[Pipeline]:
    """The pipelines that bring a graph into the form that ``pipeline`` expects, in order."""
    return [] if pipeline.after is None else [*_earlier(pipeline.after), pipeline.after]
