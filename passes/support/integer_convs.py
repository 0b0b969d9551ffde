"""What the passes for integer convolutions have in common: how a layer is read, where the operators have arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.kernels import OPERATORS
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call

__all__ = ["DTYPE", "READS_FLOATS", "RESIDUAL", "integer_weight", "pair_of", "stored_tensor"]

_conv, _pointwise = OPERATORS.integer_conv, OPERATORS.integer_pointwise_conv
#: Position of what is added to the result, and of the result's dtype.
RESIDUAL: dict[Any, int] = {_conv.default: 4, _conv.rows: 5, _pointwise.default: 5, _pointwise.rows: 5}
DTYPE: dict[Any, int] = {_conv.default: 7, _conv.rows: 11, _pointwise.default: 8, _pointwise.rows: 9}
#: Those that read an image of floats.
READS_FLOATS = (_pointwise.default, _pointwise.rows)


def pair_of(value: Any) -> tuple[int, int] | None:
    """A setting of both axes of an image, given as one number or as two; None where it is neither."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    numbers = numbers * 2 if len(numbers) == 1 else numbers
    return numbers if len(numbers) == 2 and all(isinstance(n, int) for n in numbers) else None


def stored_tensor(graph_module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that ``node`` reads from the module; None where it is computed."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    value = read_attribute(graph_module, str(node.target))
    return value.detach() if isinstance(value, Tensor) else None


def integer_weight(graph_module: fx.GraphModule, matrix: Any) -> tuple[Tensor, Tensor] | None:
    """The int8 weight ``[K, ...]`` that ``matrix`` dequantizes and its scales ``[K]``; None with any zero point."""
    if not is_call(matrix, decomposed.dequantize_per_channel.default) or matrix.args[3] != 0:
        return None
    weight, scale, zeros = (stored_tensor(graph_module, argument) for argument in matrix.args[:3])
    if weight is None or scale is None or zeros is None or weight.dtype != torch.int8 or bool(zeros.any()):
        return None
    return weight, scale
