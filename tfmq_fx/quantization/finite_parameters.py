"""No program leaves conversion whose scales would make nothing but NaN or zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import OpOverload, schema_of
from tfmq_fx.errors import CalibrationError
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import fqn

__all__ = ["require_finite_parameters"]

NAMESPACE = "quantized_decomposed::"


def require_finite_parameters(graph_module: fx.GraphModule) -> None:
    """Refuse a converted graph with a scale that is not a positive, finite number, whoever chose it.

    Our own observers give no other; those of further quantizers in a ``ComposableQuantizer`` may.

    Args:
        graph_module: The converted graph.

    Raises:
        CalibrationError: There is one; the error names the layer that reads the quantized tensor.
    """
    for node in graph_module.graph.nodes:
        target = node.target
        if not (isinstance(target, OpOverload) and schema_of(target).name.startswith(NAMESPACE)):
            continue
        scale = _value(graph_module, node.args[1])
        if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
            msg = (
                f"the quantization of {_reader(node)!r} (node {node.name!r}) has a scale that is no positive number; "
                "calibrate again without NaN and infinite values"
            )
            raise CalibrationError(msg)


def _value(graph_module: fx.GraphModule, scale: Any) -> Tensor | None:
    """A scale that is known beforehand, float64; None where the graph computes it."""
    if isinstance(scale, (int, float)):
        return torch.tensor(float(scale), dtype=torch.float64)
    if not (isinstance(scale, fx.Node) and scale.op == "get_attr"):
        return None
    value = read_attribute(graph_module, str(scale.target))
    return value.double() if isinstance(value, Tensor) else None


def _reader(node: fx.Node) -> str:
    """The first layer behind a quantizer."""
    reader = node
    while reader.users and str(reader.target).startswith("quantized_decomposed."):
        reader = next(iter(reader.users))
    return fqn(reader)
