"""``backend="auto"``: lower with every backend that is there, measure them in turn, keep the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tfmq_fx.errors import LoweringError
from tfmq_fx.frontend.examples import example_arguments
from tfmq_fx.lowering.backends.backend import Backend
from tfmq_fx.lowering.backends.registry import available_backends, find_backend
from tfmq_fx.lowering.options import LoweringOptions
from tfmq_fx.lowering.report.report import Measurement
from tfmq_fx.lowering.run.denoiser import Denoiser
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["BACKEND", "AutoBackend", "candidates", "lower_fastest"]

#: Rounds of measuring: as many as fit into the seconds, within these bounds.
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 30, 20.0

Candidate = tuple[str, str | None]


class AutoBackend(Backend):
    """Lowers with every backend that may be tried, and keeps the fastest on this machine."""

    name, title = "auto", "the fastest backend"
    summary = "the fastest of those installed, measured on this machine"
    automatic = False

    def lower(self, program: QuantizedProgram, options: LoweringOptions) -> Denoiser:
        """Lower with each and time them on example inputs."""

        def lower_with(name: str, precision: str | None) -> Denoiser:
            backend = find_backend(name)
            return backend.lower(program, backend.check(replace(options, precision=precision)))

        return lower_fastest(lower_with, *example_arguments(program.graph_module, program.indexed))


def candidates() -> list[Candidate]:
    """Every backend that is installed and may be tried, with each of its precisions."""
    backends = [find_backend(name) for name in available_backends()]
    tried = [backend for backend in backends if backend.automatic and backend.package_suffix is None]
    return [(backend.name, precision) for backend in tried for precision in backend.precisions or (None,)]


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
    lowered: dict[Candidate, Denoiser] = {}
    measured: list[Measurement] = []
    for backend, precision in candidates():
        try:
            lowered[backend, precision] = lower_with(backend, precision)
        except LoweringError as error:
            measured.append(Measurement(backend, precision, None, str(error)))
    if not lowered:
        msg = f"no backend can run this program: {'; '.join(f'{m.backend}: {m.reason}' for m in measured)}"
        raise LoweringError(msg)
    times = _times(lowered, args, kwargs)
    medians = {candidate: statistics.median(seconds) for candidate, seconds in times.items()}
    measured += [Measurement(*candidate, 1e3 * seconds) for candidate, seconds in medians.items()]
    measured.sort(key=lambda m: (m.milliseconds is None, m.milliseconds))
    winner = lowered[min(medians, key=lambda candidate: medians[candidate])]
    winner.report = replace(winner.report, measured=tuple(measured))
    return winner


def _times(
    lowered: dict[Candidate, Denoiser], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[Candidate, list[float]]:
    """Seconds of each call, by candidate."""
    for denoiser in lowered.values():
        denoiser(*args, **kwargs)
    once = sum(_seconds(denoiser, args, kwargs) for denoiser in lowered.values())
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once)))
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in lowered}
    for _ in range(rounds):
        for candidate, denoiser in lowered.items():
            times[candidate].append(_seconds(denoiser, args, kwargs))
    return times


def _seconds(denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    start = time.perf_counter()
    denoiser(*args, **kwargs)
    return time.perf_counter() - start


BACKEND = AutoBackend()
