"""Engines in turn, A B C A B C ..., one running at a time, and what their times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timing.process import WorkerProcess, processor_seconds

__all__ = ["Turn", "ratios", "run_rounds", "spread"]

#: Threads of kernels spin for some milliseconds after the last one; the next engine starts when they sleep.
PAUSE = 0.03
#: Share of the processor that other processes may have during a turn before it is repeated, and how often.
DISTURBED, REPEATS = 0.05, 3


@dataclass(frozen=True)
class Turn:
    """One engine's turn.

    Attributes:
        seconds: Of each call.
        others: Share of the cores' time that went to other processes, the sleeping engines included.
        peak_bytes: Most memory of the worker.
    """

    seconds: tuple[float, ...]
    others: float
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """The turn's time."""
        return statistics.median(self.seconds)


def _turn(worker: WorkerProcess, request: Mapping[str, Any], cores: int) -> Turn:
    """One turn; one that others disturbed is repeated, and the least disturbed one counts."""
    turns = []
    for _ in range(REPEATS):
        time.sleep(PAUSE)
        busy, own, began = processor_seconds(), worker.own_seconds(), time.perf_counter()
        answer = worker.ask(**request)
        elapsed = time.perf_counter() - began
        seconds = answer["seconds"]
        values = tuple(seconds) if isinstance(seconds, list) else (seconds,)
        taken = max(0.0, (processor_seconds() - busy) - (worker.own_seconds() - own))
        # The kernel counts in steps of 10 ms, so one step on each core says nothing.
        others = max(0.0, taken - 0.01 * cores) / (elapsed * cores)
        turns.append(Turn(values, others, answer.get("peak_bytes", 0)))
        if others <= DISTURBED:
            break
    return min(turns, key=lambda turn: turn.others)


def run_rounds(
    workers: Iterable[WorkerProcess], rounds: int, request: Mapping[str, Any], cores: int
) -> dict[str, list[Turn]]:
    """Let every worker have its turn, round after round.

    Args:
        workers: Loaded and warm.
        rounds: How many rounds.
        request: What :meth:`WorkerProcess.ask` is given.
        cores: How many cores the workers may use.

    Returns:
        The turns of each engine by its name.
    """
    workers = list(workers)
    turns: dict[str, list[Turn]] = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            turns[worker.name].append(_turn(worker, request, cores))
    return turns


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(reference: Sequence[Turn], turns: Sequence[Turn]) -> dict[str, float]:
    """How many times faster than the reference, from each round's own pair of turns."""
    return spread([theirs.median / ours.median for theirs, ours in zip(reference, turns, strict=True)])
