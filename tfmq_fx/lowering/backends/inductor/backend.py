"""Inductor as a backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import fx

from tfmq_fx._torch.operators import HAS_INTEGER_CONVS
from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.kernels import has_native_kernels
from tfmq_fx.lowering.backends.backend import CompiledGraphs, CompilerBackend, GraphToCompile
from tfmq_fx.lowering.backends.inductor import native
from tfmq_fx.lowering.backends.inductor.compiler import compile_inductor, compiler_errors
from tfmq_fx.lowering.options import BackendSupport
from tfmq_fx.lowering.plan import LoweringPlan
from tfmq_fx.lowering.report.eligibility import reads_one_channel, reads_wide_integers, sums_may_overflow
from tfmq_fx.lowering.report.matching import KernelsByModule, in_float
from tfmq_fx.lowering.report.reasons import NO_EXACT_BYTES
from tfmq_fx.lowering.report.report import ReportEntry
from tfmq_fx.passes import DequantizeWeights, LowerIndexedConvs, StripDeadState
from tfmq_fx.passes.support.predicates import is_weighted

__all__ = ["InductorBackend"]


class InductorBackend(CompilerBackend):
    """Compiles once for every batch size, on our integer kernels or oneDNN's."""

    name, title = "inductor", "Inductor"
    summary = "torch.compile with frozen weights, here and now"

    @property
    def support(self) -> BackendSupport:  # type: ignore[override]  # it depends on the processor
        """Whether items of one call may have any timesteps: our own kernels take the row of each, oneDNN's one."""
        return BackendSupport(stages=True, mixed_groups=has_native_kernels())

    @property
    def precisions(self) -> tuple[str, ...]:
        """``"bf16"`` where our own kernels run, and ``"f32"``."""
        return native.precisions()

    def describe_kernels(self, precision: str) -> str:
        """Ours or oneDNN's."""
        return native.describe_kernels(precision)

    def rewrite(
        self, graph_module: fx.GraphModule, entries: tuple[ReportEntry, ...], *, one_group: bool
    ) -> tuple[ReportEntry, ...]:
        """Write out convolutions with indexed parameters; dequantize the weights that its kernels would get wrong."""
        exact = sums_bytes_exactly()
        if one_group and HAS_INTEGER_CONVS and exact:
            LowerIndexedConvs()(graph_module)
            StripDeadState()(graph_module)
        entries = native.with_native_layers(graph_module, entries)
        DequantizeWeights(_computed_in_float if exact else is_weighted)(graph_module)
        StripDeadState()(graph_module)
        return entries if exact else in_float(entries, NO_EXACT_BYTES)

    def compile_graphs(self, graphs: Sequence[GraphToCompile], plan: LoweringPlan) -> CompiledGraphs:
        """Compile each graph by itself."""
        runs, counts = [], Counter[str]()
        for graph in graphs:
            graph_module = native.on_native_kernels(graph.graph_module, plan.options.precision)
            with compiler_errors():
                run, counter = compile_inductor(graph_module)
            runs.append(run)
            counts += counter.counts
        return CompiledGraphs(tuple(runs), KernelsByModule(counts))


def _computed_in_float(layer: fx.Node) -> bool:
    """Whether a layer has quantized operands that Inductor's own integer kernels would get wrong."""
    wide = reads_wide_integers(layer) and not native.reads_words(layer)
    return wide or reads_one_channel(layer) or sums_may_overflow(layer)
