"""Which integer kernels this processor runs for Inductor, and how a graph gets to ours."""

from __future__ import annotations

import copy
import platform

import torch
from torch import fx

from tfmq_fx.kernels.inductor import has_native_kernels, register_native_kernels
from tfmq_fx.passes import NATIVE_KERNELS, NarrowActivations, run_pipeline

__all__ = ["describe_kernels", "on_native_kernels", "precisions", "sums_bytes_exactly"]


def sums_bytes_exactly() -> bool:
    """Whether oneDNN's integer kernels are exact here: on x86 without VNNI a sum of two products can saturate."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_vnni_supported()


def precisions() -> tuple[str, ...]:
    """What can pass between the integer kernels of Inductor's backends, the default first."""
    return ("bf16", "f32") if has_native_kernels() else ("f32",)


def describe_kernels(precision: str | None) -> str:
    """Whose integer kernels the backends of Inductor use here, for the report."""
    if not has_native_kernels():
        return "oneDNN" if sums_bytes_exactly() else ""
    return f"tfmq_fx (AVX-512 VNNI, {precision or precisions()[0]} between them)"


def on_native_kernels(graph_module: fx.GraphModule, precision: str | None) -> fx.GraphModule:
    """``graph_module`` on our own integer kernels, a copy; itself where this processor does not run them.

    Args:
        graph_module: A q/dq graph that is about to be compiled. What our kernels do not cover stays as it is, for
            oneDNN's and Inductor's own.
        precision: One of :func:`precisions`; None takes the default.
    """
    if not has_native_kernels():
        return graph_module
    register_native_kernels()
    lowered = copy.deepcopy(graph_module)
    run_pipeline(lowered, NATIVE_KERNELS)
    if (precision or precisions()[0]) == "bf16":
        run_pipeline(lowered, (NarrowActivations,))
    return lowered
