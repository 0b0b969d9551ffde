"""The one place for imports that torch and torchao do not promise to keep."""

from __future__ import annotations

from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

__all__ = ["Q_ANNOTATION_KEY"]
