"""What backends have in common that translate a graph into another engine's operators, for one batch size at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from tfmq_fx.frontend.examples import EXAMPLE_BATCH
from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend, GraphToCompile
from tfmq_fx.lowering.plan import LoweringPlan
from tfmq_fx.lowering.report.matching import KernelsByNode
from tfmq_fx.lowering.translation.float32_interface import as_float32, with_types_of

__all__ = ["Translated", "TranslatingBackend"]

#: The callable, and the names of the nodes that run on integer kernels.
Translated = tuple[Callable[..., Any], set[str]]


class TranslatingBackend(CompilerBackend):
    """Compiles each batch size when it first comes, and names the layers that the engine has on integer kernels."""

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
