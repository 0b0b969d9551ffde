"""What torchao's PT2E writes on graphs and nodes."""

from __future__ import annotations

from torch import fx
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

__all__ = ["Q_ANNOTATION_KEY", "is_prepared"]


def is_prepared(graph_module: fx.GraphModule) -> bool:
    """Whether torchao still knows that it prepared the graph; ``convert_pt2e`` asserts it."""
    return "_observed_graph_module_attrs" in graph_module.meta
