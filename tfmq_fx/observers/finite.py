"""No range is taken from NaN or infinite values: one such batch would make a program of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq_fx.errors import NonFiniteError

__all__ = ["input_of", "output_of", "require_finite", "weight_of"]


def input_of(layer: str) -> str:
    """What an observed activation is called: the input of the layer that it was annotated for."""
    return f"the input of layer {layer!r}" if layer else "an observed activation"


def output_of(layer: str) -> str:
    """What an observed result is called."""
    return f"the output of {layer!r}"


def weight_of(layer: str) -> str:
    """What a weight is called."""
    return f"the weight of layer {layer!r}" if layer else "a quantized weight"


def require_finite(low: Tensor, high: Tensor, x: Tensor, subject: str, rows: Tensor | None = None) -> None:
    """Refuse ``x`` unless its smallest and largest values are finite; they are NaN where any value is.

    Only what was computed anyway is looked at; the tensor itself only when it is refused.

    Args:
        low: Smallest values of ``x``, any shape.
        high: Largest values, the same shape.
        x: Where they are from, ``[N, ...]``.
        subject: What ``x`` is called.
        rows: The rows of the timestep table of its entries, ``[N]``.

    Raises:
        NonFiniteError: They are not.
    """
    if bool((low.isfinite() & high.isfinite()).all()):
        return
    table = x.detach().to(torch.float32).reshape(len(x) if x.ndim else 1, -1)
    entries = (~table.isfinite()).any(dim=1).nonzero().reshape(-1)
    bad = () if rows is None else torch.unique(rows[entries]).tolist()
    raise NonFiniteError(subject, entries.tolist(), len(table), bad)
