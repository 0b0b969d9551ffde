"""Where the forms of the integer convolution have their arguments."""

from __future__ import annotations

from typing import Any

from tfmq_fx.kernels import OPERATORS

__all__ = ["DTYPE", "RESIDUAL"]

#: Position of what is added to the result, and of the result's dtype.
RESIDUAL: dict[Any, int] = {OPERATORS.integer_conv.default: 4, OPERATORS.integer_conv.rows: 5}
DTYPE: dict[Any, int] = {OPERATORS.integer_conv.default: 7, OPERATORS.integer_conv.rows: 11}
