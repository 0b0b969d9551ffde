"""The parity check: a lowered program must be its reference up to float rounding.

Rounding to integers amplifies float noise: a value on the edge between two levels moves a whole level.
So the yardstick is the program itself, run twice in eager mode on inputs that differ by float rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfmq_fx.errors import LoweringError

__all__ = ["check_parity", "relative_error"]

#: Relative size of the perturbation: what a chain of reordered float32 sums adds up to.
PERTURBATION = 1e-5
#: The lowered program may part from its reference by this many times the program's own rounding noise…
ALLOWED_RATIO = 8.0
#: …or by this much, whichever is more: in float32, and with bfloat16 between the kernels, where more levels move.
ALLOWED_FLOOR, ALLOWED_NARROW = 2e-2, 4e-2


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach().float() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def relative_error(outputs: Any, reference: Any) -> float:
    """Largest ``norm(a - b) / norm(b)`` over the tensors of two equal structures; NaN counts as infinite."""
    errors = [
        float((a - b).norm() / b.norm().clamp_min(1e-12))
        for a, b in zip(_tensors(outputs), _tensors(reference), strict=True)
    ]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def _perturbed(leaf: Any, generator: torch.Generator) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
        return leaf * (1 + PERTURBATION * torch.randn(leaf.shape, generator=generator).to(leaf))
    return leaf


@torch.no_grad()
def check_parity(
    lowered: Callable[..., Any],
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    narrow: bool = False,
) -> tuple[float, float]:
    """Compare ``lowered`` with ``reference`` on ``args`` and ``kwargs``.

    Args:
        lowered: The program as it was compiled.
        reference: The same in eager mode.
        args: Example inputs.
        kwargs: Example inputs by name.
        narrow: Whether bfloat16 passes between the kernels of ``lowered``.

    Returns:
        The relative error, and the program's own rounding noise on the same scale.

    Raises:
        LoweringError: They part by more than rounding explains.
    """
    expected = reference(*args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    moved_args, moved_kwargs = pytree.tree_map(lambda leaf: _perturbed(leaf, generator), (args, kwargs))
    floor = relative_error(reference(*moved_args, **moved_kwargs), expected)
    error = relative_error(lowered(*args, **kwargs), expected)
    if error > max(ALLOWED_RATIO * floor, ALLOWED_NARROW if narrow else ALLOWED_FLOOR):
        msg = (
            f"the lowered program parts from its reference: relative error {error:.2e}, where rounding alone explains "
            f"{floor:.2e}; this is a miscompilation on this machine, use backend='reference' and report it"
        )
        raise LoweringError(msg)
    return error, floor
