"""``backend="auto"``: lower with every backend that is there, measure them in turn, keep the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tfmq_fx.errors import LoweringError
from tfmq_fx.lowering.backends.engines import ENGINES, available_engines
from tfmq_fx.lowering.backends.inductor.native import precisions
from tfmq_fx.lowering.report.report import Measurement
from tfmq_fx.lowering.run.denoiser import Denoiser

__all__ = ["candidates", "lower_fastest"]

#: Rounds of measuring: as many as fit into the seconds, within these bounds.
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 30, 20.0

Candidate = tuple[str, str | None]


def candidates() -> list[Candidate]:
    """Inductor and every installed engine, with each of their precisions."""
    return [
        *(("inductor", p) for p in precisions()),
        *((name, p) for name in available_engines() for p in ENGINES[name].precisions),
    ]


def lower_fastest(
    lower_with: Callable[[str, str | None], Denoiser], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Denoiser:
    """Lower with each candidate, time them in turn (A B C A B C …) on the same inputs, and return the fastest.

    What another backend refuses, or computes wrong, leaves it out of the race; the report says why.

    Args:
        lower_with: Lowers for a backend and a precision.
        args: Example inputs.
        kwargs: Example inputs by name.

    Returns:
        The denoiser with the smallest median time; ``report.measured`` has every candidate.

    Raises:
        LoweringError: No candidate is left.
    """
    found: dict[Candidate, Denoiser] = {}
    measured: list[Measurement] = []
    for backend, precision in candidates():
        try:
            found[backend, precision] = lower_with(backend, precision)
        except LoweringError as error:
            measured.append(Measurement(backend, precision, None, str(error)))
    if not found:
        msg = f"no backend can run this program: {'; '.join(f'{m.backend}: {m.reason}' for m in measured)}"
        raise LoweringError(msg)
    times = _times(found, args, kwargs)
    medians = {candidate: statistics.median(seconds) for candidate, seconds in times.items()}
    measured += [Measurement(*candidate, 1e3 * seconds) for candidate, seconds in medians.items()]
    measured.sort(key=lambda m: (m.milliseconds is None, m.milliseconds))
    winner = found[min(medians, key=lambda candidate: medians[candidate])]
    winner.report = replace(winner.report, measured=tuple(measured))
    return winner


def _times(
    found: dict[Candidate, Denoiser], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Candidate, list[float]]:
    """Seconds of each call, by candidate."""
    for denoiser in found.values():
        denoiser(*args, **kwargs)
    once = sum(_seconds(denoiser, args, kwargs) for denoiser in found.values())
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once)))
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in found}
    for _ in range(rounds):
        for candidate, denoiser in found.items():
            times[candidate].append(_seconds(denoiser, args, kwargs))
    return times


def _seconds(denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    began = time.perf_counter()
    denoiser(*args, **kwargs)
    return time.perf_counter() - began
