"""Keep what a unit has learned only when it is better than what it had."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tfmq_fx.fake_quantizers import AdaRoundQuantizer, FakeQuantizer
from tfmq_fx.reconstruction.report import UnitResult

__all__ = ["keep_if_better", "undo_if_worse"]


def _snapshot(quantizers: Sequence[FakeQuantizer]) -> list[dict[str, Tensor]]:
    return [
        {name: value.clone() for name, value in quantizer.state_dict().items() if name != "weight"}
        for quantizer in quantizers
    ]


def _restore(quantizers: Sequence[FakeQuantizer], states: Sequence[dict[str, Tensor]]) -> None:
    for quantizer, state in zip(quantizers, states, strict=True):
        quantizer.load_state_dict(state, strict=False)


def undo_if_worse(quantizers: Sequence[FakeQuantizer], learn: Callable[[], None], measure: Callable[[], float]) -> None:
    """Train, and put the quantizers back where the error on held-back samples rose."""
    before, states = measure(), _snapshot(quantizers)
    learn()
    if not measure() <= before:
        _restore(quantizers, states)


def keep_if_better(
    name: str,
    kind: str,
    quantizers: Sequence[FakeQuantizer],
    before: float,
    learn: Callable[[], None],
    measure: Callable[[], float],
    iterations: int,
) -> UnitResult:
    """Train a unit, or round it otherwise; put its quantizers back when the error on held-back samples did not fall.

    An exception, an interrupt among them, puts them back too.

    Args:
        name: The unit's name.
        kind: Its kind.
        quantizers: Everything that training may change, as it is before.
        before: The error before.
        learn: Trains, or chooses the rounding otherwise.
        measure: The error now, with hard rounding.
        iterations: Training steps, for the report.
    """
    began = time.perf_counter()
    states = _snapshot(quantizers)
    accepted = False
    try:
        learn()
        after = measure()
        accepted = after <= before
    finally:
        if not accepted:
            _restore(quantizers, states)
    weights = [(q, s["up"]) for q, s in zip(quantizers, states, strict=True) if isinstance(q, AdaRoundQuantizer)]
    total = sum(up.numel() for _, up in weights)
    changed = sum(int(torch.count_nonzero(quantizer.up != up)) for quantizer, up in weights)
    return UnitResult(
        name=name,
        kind=kind,
        weights=total,
        before=before,
        after=after if accepted else before,
        changed=changed / max(total, 1),
        iterations=iterations,
        seconds=time.perf_counter() - began,
        reason="" if accepted else f"the error rose to {after:.3g}, so the weights stay rounded to nearest",
    )
