"""The reference: quantize and dequantize in float, in eager mode."""

from __future__ import annotations

from collections.abc import Sequence

from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend, GraphToCompile
from tfmq_fx.lowering.options import BackendSupport
from tfmq_fx.lowering.plan import LoweringPlan
from tfmq_fx.lowering.report.matching import NoKernels
from tfmq_fx.lowering.report.reasons import EAGER

__all__ = ["BACKEND", "ReferenceBackend"]


class ReferenceBackend(CompilerBackend):
    """Compiles nothing: what the other backends are compared with, slow and exact everywhere."""

    name, title = "reference", "the reference"
    summary = "eager quantize/dequantize: slow, and what the others are compared with"
    automatic = False
    support = BackendSupport(mixed_groups=True, compared=False)

    def compile_graphs(self, graphs: Sequence[GraphToCompile], plan: LoweringPlan) -> CompiledGraphs:
        """The graphs themselves."""
        return CompiledGraphs(tuple(graph.graph_module for graph in graphs), NoKernels(EAGER))


BACKEND = ReferenceBackend()
