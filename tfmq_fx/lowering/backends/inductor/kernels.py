"""Count the integer kernels in a graph that Inductor has finished with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx

from tfmq_fx._torch.operators import find_schema
from tfmq_fx.passes.support.predicates import module_path

__all__ = ["KernelCounter"]

#: Inductor's post-grad graph calls integer kernels through functions with these names in them.
INTEGER_KERNELS = ("qconv", "qlinear", "integer_conv", "integer_pointwise_conv")
#: Our kernel of attention computes both of its products.
BOTH_PRODUCTS = "integer_attention"
PREPACK = "prepack"


class KernelCounter:
    """A post-grad pass that reads the graph and changes nothing: integer kernels by module path."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, graph: fx.Graph) -> None:
        """Count the integer kernels of ``graph``; a later graph replaces an earlier one."""
        self.counts = Counter()
        for node in graph.nodes:
            self.counts[module_path(node)] += _integer_kernels(node)


def _integer_kernels(node: fx.Node) -> int:
    """How many layers ``node`` computes on an integer kernel."""
    if node.op != "call_function":
        return 0
    name = _name(node.target)
    if BOTH_PRODUCTS in name:
        return 2
    return int(any(kernel in name for kernel in INTEGER_KERNELS) and PREPACK not in name)


def _name(target: Callable[..., Any] | str) -> str:
    # Matched patterns become functools.partial objects around a lowering function.
    inner = getattr(target, "func", target)
    return str(getattr(inner, "__qualname__", inner)) if find_schema(inner) is None else str(inner)
