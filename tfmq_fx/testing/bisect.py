"""Find the first pass after which a graph computes something else than before, or than a reference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.lowering.report.parity import relative_error
from tfmq_fx.passes.base import Numerics
from tfmq_fx.passes.observation import PassApplication, observe_passes

from .run_checks import run_graph

__all__ = ["BisectStep", "Bisection", "bisect_passes", "values_of_inputs"]

#: How many lines of the difference a printed result shows.
SHOWN_NODES = 12


@dataclass(frozen=True)
class BisectStep:
    """One application of one pass, and what it did to the results.

    Attributes:
        index: How many passes were applied before it.
        pass_id: The pass.
        numerics: What the pass promises.
        modified: Whether it changed the graph.
        error_before: Error of the graph that it was given; None when that graph does not run on the inputs, as a
            part of the model does not.
        error_after: Error of the graph that it left; None likewise.
    """

    index: int
    pass_id: str
    numerics: Numerics
    modified: bool
    error_before: float | None
    error_after: float | None

    def __str__(self) -> str:
        """One line: number, pass, errors."""
        if self.error_before is None or self.error_after is None:
            errors = "does not run on these inputs"
        else:
            errors = f"{self.error_before:.3g} -> {self.error_after:.3g}"
        return f"#{self.index} {self.pass_id}: {errors}"


@dataclass(frozen=True)
class Bisection:
    """What :func:`bisect_passes` found.

    Attributes:
        steps: The applications up to the one that was found, or all of them, in order.
        culprit: The first application behind which the results part; None when they never do.
        outside: Whether they had parted before the culprit ran: something that is no pass changed the graph between
            the step before and this one. Only possible with a reference.
        removed: The culprit's nodes that are gone, as text.
        added: The culprit's nodes that are new, as text.
    """

    steps: tuple[BisectStep, ...]
    culprit: BisectStep | None = None
    outside: bool = False
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The finding in a sentence, and the nodes that the culprit exchanged."""
        compared = [step for step in self.steps if step.error_after is not None]
        if self.culprit is None:
            largest = max((step.error_after or 0.0 for step in compared), default=0.0)
            return f"no pass parts from the reference: {len(compared)} of {len(self.steps)} applications were compared, the largest error is {largest:.3g}"  # noqa: E501
        if self.outside:
            return f"the results part before {self.culprit}, by something that is no pass"
        lines = [f"the results part at {self.culprit}, which promises: {self.culprit.numerics}"]
        for sign, nodes in (("-", self.removed), ("+", self.added)):
            lines += [f"  {sign} {node}" for node in nodes[:SHOWN_NODES]]
            if len(nodes) > SHOWN_NODES:
                lines.append(f"  {sign} … and {len(nodes) - SHOWN_NODES} more")
        return "\n".join(lines)


class _Found(BaseException):
    """Leaves the run under test at the culprit: what it would still do is compiled from a wrong graph."""


def bisect_passes(
    run: Callable[[], object],
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    reference: Any = None,
    tolerance: float = 5e-2,
    compare: Callable[[Any, Any], float] = relative_error,
    skip: Sequence[str] = (),
) -> Bisection:
    """Run ``run`` and find the first pass in it after which the results part.

    Every graph that a pass is called on is run eagerly before and after, on the same inputs; so one run is enough,
    and it ends at the culprit. Without a reference a pass is held against the graph that it was given, and against
    its own promise: one that promises results equal to the bit must give them, others must stay within ``tolerance``.
    So quantization, calibration and whatever else is no pass may change the results in between.

    Args:
        run: Calls the passes, e.g. ``lambda: tfmq_fx.lower(program)``; what it returns is not used.
        inputs: Tensors by name of the placeholders, or in their order. They are cast to the dtype that a placeholder
            has. A graph with other placeholders, such as a part of the model, is not compared.
        reference: The results that are right, one tensor or a sequence; then all graphs are held against them.
        tolerance: The largest error that is not a difference.
        compare: The error of results against a reference; by default the largest ``norm(a - b) / norm(b)`` of a
            tensor.
        skip: Ids of passes to leave out.

    Returns:
        The steps, and the culprit among them.

    Raises:
        ConfigError: A pass to skip does not exist.
        Exception: Whatever ``run`` raises before a culprit is found.
    """
    search = _Search(inputs, reference, tolerance, compare)
    try:
        with observe_passes(skip=skip, before=search.before, after=search.after):
            run()
    except _Found:
        pass
    return search.result()


class _Search:
    """The hooks of one bisection and what they have seen."""

    def __init__(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        reference: Any,
        tolerance: float,
        compare: Callable[[Any, Any], float],
    ) -> None:
        self.inputs, self.reference, self.tolerance, self.compare = inputs, reference, tolerance, compare
        self.steps: list[BisectStep] = []
        self.outputs: Any = None
        self.nodes: list[str] = []
        self.outcome = Bisection(())

    def before(self, application: PassApplication) -> None:
        self.outputs = self._outputs(application.graph_module)
        self.nodes = _lines(application.graph_module)

    def after(self, application: PassApplication) -> None:
        rewrite, outputs = application.rewrite, None
        errors: tuple[float, float] | tuple[None, None] = (None, None)
        if self.outputs is not None:
            outputs = self._outputs(application.graph_module)
        if outputs is not None:
            expected = self.outputs if self.reference is None else self.reference
            errors = (self.compare(self.outputs, expected), self.compare(outputs, expected))
        step = BisectStep(application.index, rewrite.id, rewrite.numerics, application.modified, *errors)
        self.steps.append(step)
        if step.error_before is None or step.error_after is None:
            return
        exact = self.reference is None and rewrite.numerics is Numerics.EXACT
        allowed = 0.0 if exact else self.tolerance
        # Not ``>``: an error that is no number is an error.
        if not step.error_before <= self.tolerance:
            self.outcome = Bisection((), step, outside=True)
            raise _Found
        if not step.error_after <= allowed:
            removed, added = _difference(self.nodes, _lines(application.graph_module))
            self.outcome = Bisection((), step, removed=removed, added=added)
            raise _Found

    def result(self) -> Bisection:
        outcome = self.outcome
        return Bisection(tuple(self.steps), outcome.culprit, outcome.outside, outcome.removed, outcome.added)

    def _outputs(self, graph_module: fx.GraphModule) -> Any:
        values = values_of_inputs(graph_module, self.inputs)
        return None if values is None else run_graph(graph_module, values)


def values_of_inputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any] | Sequence[Any]) -> list[Any] | None:
    """One value per placeholder, of the dtype that it has; None where a placeholder has none among ``inputs``."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if isinstance(inputs, Mapping):
        if any(str(node.target) not in inputs for node in placeholders):
            return None
        values = [inputs[str(node.target)] for node in placeholders]
    else:
        if len(inputs) != len(placeholders):
            return None
        values = list(inputs)
    pairs = zip(placeholders, values, strict=True)
    return [_like(value, node.meta.get("val")) for node, value in pairs]


def _like(value: Any, recorded: Any) -> Any:
    return value.to(recorded.dtype) if isinstance(value, Tensor) and isinstance(recorded, torch.Tensor) else value


def _lines(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.format_node()) for node in graph_module.graph.nodes if node.op != "output"]


def _difference(before: list[str], after: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    removed, added = (tuple(line[1:] for line in lines if line.startswith(sign)) for sign in "-+")
    return removed, added
