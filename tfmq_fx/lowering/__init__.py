"""Lowering: a quantized program becomes a denoiser on real kernels."""

from tfmq_fx.lowering.denoiser import Denoiser
from tfmq_fx.lowering.lower import load_denoiser, lower
from tfmq_fx.lowering.report import LoweringReport, ReportEntry

__all__ = ["Denoiser", "LoweringReport", "ReportEntry", "load_denoiser", "lower"]
