"""Operators of torch as objects, and what their schemas say."""

from __future__ import annotations

import torch
import torchao  # noqa: F401  (registers the operators of quantized_decomposed)
from torch._C import FunctionSchema
from torch._ops import HigherOrderOperator, OpOverload

__all__ = [
    "CHECK",
    "HAS_INTEGER_CONVS",
    "HigherOrderOperator",
    "OpOverload",
    "decomposed",
    "find_schema",
    "functional_twin",
    "schema_of",
]

#: ``torch._check``: what models write to tell the exporter a condition.
CHECK = torch._check

#: The operators that quantize and dequantize: they exist once torchao is imported.
decomposed = torch.ops.quantized_decomposed

#: Whether this build of torch has oneDNN's integer convolution.
HAS_INTEGER_CONVS: bool = hasattr(torch.ops.onednn, "qconv_prepack")


def schema_of(operator: OpOverload) -> FunctionSchema:
    """The schema of an operator: its ``name``, ``arguments``, ``returns`` and whether it ``is_mutable``."""
    return operator._schema


def find_schema(target: object) -> FunctionSchema | None:
    """The schema of what a node calls; None where it is a function of Python or a name."""
    return getattr(target, "_schema", None)


def functional_twin(operator: OpOverload) -> OpOverload | None:
    """``add.Tensor`` for ``add_.Tensor``; None for an operator that is not called like one in place, or has no twin."""
    name = operator._opname
    packet = getattr(getattr(torch.ops, operator.namespace), name.removesuffix("_"), None)
    found = getattr(packet, operator._overloadname, None) if name.endswith("_") else None
    return found if isinstance(found, OpOverload) else None


def _prepacked(weight: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return torch.empty_like(weight)


if HAS_INTEGER_CONVS:
    # torch 2.13 prepacks weights behind its own tracing only, so it does not know the shape of the result.
    torch.library.register_fake("onednn::qconv_prepack", _prepacked)
