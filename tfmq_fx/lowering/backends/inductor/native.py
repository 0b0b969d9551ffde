"""Which integer kernels this processor runs for Inductor, and how a graph gets to ours."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import fx

from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.kernels import has_native_kernels
from tfmq_fx.lowering.report.eligibility import layers
from tfmq_fx.lowering.report.reasons import PER_ROW, ROWS_UNCOVERED, WIDE
from tfmq_fx.lowering.report.report import ReportEntry
from tfmq_fx.passes import NARROW_ACTIVATIONS, NATIVE_KERNELS
from tfmq_fx.passes.native.lower_integer_convs import find_integer_layer
from tfmq_fx.passes.native.lower_pointwise_convs import find_pointwise_layer

__all__ = ["describe_kernels", "on_native_kernels", "precisions", "reads_words", "with_native_layers"]


def precisions() -> tuple[str, ...]:
    """What can pass between the integer kernels of Inductor's backends, the default first."""
    return ("bf16", "f32") if has_native_kernels() else ("f32",)


def describe_kernels(precision: str | None) -> str:
    """Whose integer kernels the backends of Inductor use here, for the report."""
    if not has_native_kernels():
        return "oneDNN" if sums_bytes_exactly() else ""
    return f"tfmq_fx (AVX-512 VNNI, {precision or precisions()[0]} between them)"


def with_native_layers(graph_module: fx.GraphModule, entries: tuple[ReportEntry, ...]) -> tuple[ReportEntry, ...]:
    """The entries of ``graph_module``'s layers; rows of a table and pointwise layers of 16 bits are our kernels' too.

    What our kernels do not cover of them (channels in no multiple of 16) is computed in float.
    """
    if not has_native_kernels():
        return entries
    return tuple(
        _covered(graph_module, node, entry) if entry.reason in (PER_ROW, WIDE) else entry
        for node, entry in zip(layers(graph_module), entries, strict=True)
    )


def _covered(graph_module: fx.GraphModule, node: fx.Node, entry: ReportEntry) -> ReportEntry:
    if find_integer_layer(graph_module, node) is None and find_pointwise_layer(graph_module, node) is None:
        return replace(entry, reason=ROWS_UNCOVERED if entry.reason == PER_ROW else entry.reason)
    return replace(entry, kernel="integer", reason="", eligible=True)


def reads_words(layer: fx.Node) -> bool:
    """Whether our kernel for pointwise convolutions of 16 bits takes ``layer`` here."""
    owner = layer.graph.owning_module
    return has_native_kernels() and owner is not None and find_pointwise_layer(owner, layer) is not None


def on_native_kernels(graph_module: fx.GraphModule, precision: str | None) -> fx.GraphModule:
    """``graph_module`` on our own integer kernels, a copy; itself where this processor does not run them.

    Args:
        graph_module: A q/dq graph that is about to be compiled. What our kernels do not cover stays as it is, for
            oneDNN's and Inductor's own.
        precision: One of :func:`precisions`; None takes the default.
    """
    if not has_native_kernels():
        return graph_module
    from tfmq_fx.kernels.inductor import register_native_kernels  # seconds to import: to compile only

    register_native_kernels()
    lowered = copy.deepcopy(graph_module)
    NATIVE_KERNELS.run(lowered)
    if (precision or precisions()[0]) == "bf16":
        NARROW_ACTIVATIONS.run(lowered)
    return lowered
