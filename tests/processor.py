"""What tests may expect of integer kernels on the processor that they run on."""

from __future__ import annotations

import pytest

from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.kernels import has_native_kernels
from tfmq_fx.lowering.report.reasons import NO_EXACT_BYTES
from tfmq_fx.lowering.report.report import LoweringReport

__all__ = ["multiplies_bytes", "needs_exact_sums", "on_integer_kernels"]

#: For tests of oneDNN's integer kernels themselves.
needs_exact_sums = pytest.mark.skipif(
    not sums_bytes_exactly(), reason="this processor has no VNNI: oneDNN's sums of bytes saturate"
)


def multiplies_bytes(backend: str) -> bool:
    """Whether ``backend`` has integer kernels here."""
    if backend in ("reference", "openvino"):
        return backend == "openvino" and sums_bytes_exactly()
    return backend == "onnxruntime" or sums_bytes_exactly() or has_native_kernels()


def on_integer_kernels(report: LoweringReport, at_least: int) -> bool:
    """Whether all eligible layers, ``at_least`` or more, are on integer kernels, or in float for want of exact ones."""
    if multiplies_bytes(report.backend):
        return report.integer_kernels == report.eligible >= at_least
    reasons = {entry.reason for entry in report.entries if entry.eligible}
    return report.integer_kernels == 0 and report.eligible >= at_least and reasons == {NO_EXACT_BYTES}
