"""The parity check: a lowered program must be the quantized program up to float rounding.

Rounding to integers amplifies float noise: a value on the edge between two levels moves a whole level.
So the yardstick is the program itself, run twice in eager mode on inputs that differ by float rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq_fx._torch import pytree
from tfmq_fx.errors import LoweringError

__all__ = ["check_parity", "relative_error"]

#: Relative size of the perturbation: what a chain of reordered float32 sums adds up to.
PERTURBATION = 1e-5
#: The lowered program may part from the quantized one by this many times the program's own rounding noise…
ALLOWED_RATIO = 4.0
#: …or by this much, whichever is more: in float32, and with bfloat16 between the kernels, where more levels move.
ALLOWED_FLOOR, ALLOWED_NARROW = 2e-2, 4e-2
#: Perturbations that a call's error is held against before it counts as one: which values move is a matter of chance.
MOST_PERTURBATIONS = 3
#: Never by more than this, however noisy the program: zeros are 1 off, an unrelated result 1.4, half or twice the right
#: one 0.5 and 1; below it the two have a cosine of 0.89 at least.
CEILING = 0.45


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach().double() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _types(outputs: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _require_types(actual: list[torch.dtype], expected: list[torch.dtype]) -> None:
    """Refuse results of another type; where there are more or fewer of them, the error is infinite anyway."""
    if len(actual) != len(expected):
        return
    for made, meant in zip(actual, expected, strict=True):
        if made != meant:
            names = [str(dtype).removeprefix("torch.") for dtype in (made, meant)]
            msg = (
                f"the lowered program returns {names[0]} where the quantized program returns {names[1]}; its backend "
                "must return results of the program's own types"
            )
            raise LoweringError(msg)


def _ratio(difference: float, size: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)


def relative_error(outputs: Any, reference: Any) -> float:
    """Largest ``norm(a - b) / norm(b)`` over the tensors of two structures, in float64.

    NaN, an infinite value and another shape count as infinite, and so does anything in the place of zeros.
    """
    actual, expected = _tensors(outputs), _tensors(reference)
    if [a.shape for a in actual] != [b.shape for b in expected]:
        return math.inf
    errors = [_ratio(float((a - b).norm()), float(b.norm())) for a, b in zip(actual, expected, strict=True)]
    return max(errors, default=0.0)


def _perturbed(leaf: Any, generator: torch.Generator) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
        # A graph computes in float32 behind its inputs; in bfloat16 the perturbation would round away.
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        return leaf * (1 + PERTURBATION * torch.randn(leaf.shape, generator=generator).to(leaf))
    return leaf


@torch.no_grad()
def check_parity(
    lowered: Callable[..., Any],
    reference: Callable[..., Any],
    examples: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    narrow: bool = False,
) -> tuple[float, float]:
    """Compare ``lowered`` with ``reference`` on several calls.

    The rounding noise is measured on the first call, and again only where that does not explain an error.

    Args:
        lowered: The program as it was compiled.
        reference: The quantized program itself in eager mode, before any rewrite of the lowering.
        examples: Calls, ``(args, kwargs)`` each (:func:`tfmq_fx.lowering.report.parity_examples.parity_examples`).
        narrow: Whether bfloat16 passes between the kernels of ``lowered``.

    Returns:
        The largest relative error of a call, and the program's own rounding noise on the same scale.

    Raises:
        LoweringError: They part by more than rounding explains, or by more than can be told from a wrong result, or
            one of them gives NaN or infinite values, or ``lowered`` gives another dtype.
    """
    generator = torch.Generator().manual_seed(0)
    allowed = ALLOWED_NARROW if narrow else ALLOWED_FLOOR
    worst, floor = 0.0, -1.0
    for args, kwargs in examples:
        expected = reference(*args, **kwargs)
        if not all(bool(leaf.isfinite().all()) for leaf in _tensors(expected)):
            msg = (
                "the quantized program gives NaN or infinite values on example inputs, so nothing can be compared with "
                "it; calibrate it again with inputs like those of sampling"
            )
            raise LoweringError(msg)
        actual = lowered(*args, **kwargs)
        _require_types(_types(actual), _types(expected))
        error = relative_error(actual, expected)
        worst = max(worst, error)
        for _ in range(MOST_PERTURBATIONS):
            if floor >= 0.0 and error <= _limit(floor, allowed):
                break
            moved_args, moved_kwargs = pytree.tree_map(lambda leaf: _perturbed(leaf, generator), (args, kwargs))
            floor = max(floor, relative_error(reference(*moved_args, **moved_kwargs), expected))
        if error > _limit(floor, allowed):
            raise LoweringError(_refusal(error, floor))
    return worst, max(floor, 0.0)


def _limit(floor: float, allowed: float) -> float:
    return min(max(ALLOWED_RATIO * floor, allowed), CEILING)


def _refusal(error: float, floor: float) -> str:
    start = f"the lowered program parts from its reference: relative error {error:.2e}"
    if math.isfinite(error) and ALLOWED_RATIO * floor > CEILING:
        return (
            f"{start}, and rounding alone moves its result by {floor:.2e}, so that no result can be told from a wrong "
            "one; quantize with more bits or better calibration, or use backend='reference'"
        )
    return (
        f"{start}, where rounding alone explains {floor:.2e}; this is a miscompilation on this machine, "
        "use backend='reference' and report it"
    )
