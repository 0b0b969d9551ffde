"""Reconstruction: weight rounding is learned, the temporal block from its own output, the rest unit by unit."""

from tfmq_fx.reconstruction.reconstruct import reconstruct
from tfmq_fx.reconstruction.report import ReconstructionReport, UnitResult

__all__ = ["ReconstructionReport", "UnitResult", "reconstruct"]
