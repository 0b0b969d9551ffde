"""Where the forms of the integer convolution have their arguments."""

from __future__ import annotations

from typing import Any

from tfmq_fx.kernels import OPERATORS

__all__ = ["DTYPE", "READS_FLOATS", "RESIDUAL"]

_conv, _pointwise = OPERATORS.integer_conv, OPERATORS.integer_pointwise_conv
#: Position of what is added to the result, and of the result's dtype.
RESIDUAL: dict[Any, int] = {_conv.default: 4, _conv.rows: 5, _pointwise.default: 5, _pointwise.rows: 5}
DTYPE: dict[Any, int] = {_conv.default: 7, _conv.rows: 11, _pointwise.default: 8, _pointwise.rows: 9}
#: Those that read an image of floats.
READS_FLOATS = (_pointwise.default, _pointwise.rows)
