"""What backends have in common that translate a graph into another engine's operators, for one batch size at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import fx

from tfmq_fx.frontend.examples import EXAMPLE_BATCH
from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend, GraphToCompile
from tfmq_fx.lowering.options import BackendSupport
from tfmq_fx.lowering.plan import LoweringPlan
from tfmq_fx.lowering.report.eligibility import classify
from tfmq_fx.lowering.report.matching import KernelsByNode
from tfmq_fx.lowering.report.reasons import NO_ACTIVATION, PER_ROW
from tfmq_fx.lowering.report.report import ReportEntry
from tfmq_fx.lowering.translation.float32_interface import as_float32, with_types_of
from tfmq_fx.passes import FactorItemScales, StripDeadState

__all__ = ["Translated", "TranslatingBackend"]

#: The callable, and the names of the nodes that run on integer kernels.
Translated = tuple[Callable[..., Any], set[str]]


class TranslatingBackend(CompilerBackend):
    """Compiles each batch size when it first comes, and names the layers that the engine has on integer kernels.

    Engines' integer kernels take constant quantizers; parameters of each item are factored out of the layers.
    """

    support: ClassVar[BackendSupport] = BackendSupport(mixed_groups=True)

    def rewrite(
        self, graph_module: fx.GraphModule, entries: tuple[ReportEntry, ...], *, one_group: bool
    ) -> tuple[ReportEntry, ...]:
        """Scale items outside their layers, which then read integers of one range."""
        if not FactorItemScales()(graph_module).modified:
            return entries
        StripDeadState()(graph_module)
        factored = classify(graph_module, {})
        return tuple(
            after if before.reason == PER_ROW and after.reason != NO_ACTIVATION else before
            for before, after in zip(entries, factored, strict=True)
        )

    @abstractmethod
    def translate(self, graph_module: fx.GraphModule, batch: int, precision: str) -> Translated:
        """Compile a graph for one batch size; others follow when they come.

        Args:
            graph_module: The q/dq graph, float32 at its interface; it is kept.
            batch: The batch size to compile for at once.
            precision: One of the backend's precisions.

        Returns:
            The callable, and the names of the nodes that run on integer kernels.

        Raises:
            LoweringError: The engine lacks an operator.
        """

    def compile_graph(self, graph_module: fx.GraphModule, batch: int, precision: str) -> Translated:
        """As :meth:`translate`, for a graph of any types at its interface; it is not changed."""
        inner = as_float32(graph_module)
        run, nodes = self.translate(inner, batch, precision)
        return (run if inner is graph_module else with_types_of(graph_module, run)), nodes

    def compile_graphs(self, graphs: Sequence[GraphToCompile], plan: LoweringPlan) -> CompiledGraphs:
        """Compile each graph by itself."""
        precision = self.resolve_precision(plan.options.precision)
        compiled = [self.compile_graph(graph.graph_module, EXAMPLE_BATCH, precision) for graph in graphs]
        nodes = frozenset[str]().union(*(names for _, names in compiled))
        return CompiledGraphs(tuple(run for run, _ in compiled), KernelsByNode(nodes))
