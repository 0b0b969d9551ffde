"""The progress bar of reconstruction: unit, loss, time left, memory."""

from __future__ import annotations

from types import TracebackType

import psutil
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tfmq_fx.config.progress import draws_progress, progress_console

__all__ = ["ReconstructionProgress"]

#: Iterations between two updates of the display.
EVERY = 10


class ReconstructionProgress:
    """One bar over all training iterations, drawn on stderr; a context manager.

    Args:
        iterations: Training steps of all units together.
        enabled: Whether it is wanted (:func:`tfmq_fx.config.progress.draws_progress`).
    """

    def __init__(self, iterations: int, *, enabled: bool) -> None:
        self._process = psutil.Process()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=progress_console(),
            disable=not draws_progress(enabled),
            transient=True,
        )
        self._task: TaskID = self._bar.add_task("reconstructing", total=iterations, loss="-", memory="")

    def __enter__(self) -> ReconstructionProgress:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bar.stop()

    def start(self, name: str) -> None:
        """Name the unit that is worked on."""
        self._bar.update(self._task, description=name, memory=self._memory())

    def advance(self, iteration: int, loss: float) -> None:
        """One iteration is done."""
        self._bar.advance(self._task)
        if iteration % EVERY == 0:
            self._bar.update(self._task, loss=f"{loss:.3g}", memory=self._memory())

    def skip(self, iterations: int) -> None:
        """These iterations need not be done."""
        self._bar.advance(self._task, iterations)

    def _memory(self) -> str:
        return f"{self._process.memory_info().rss / 2**30:.1f} GiB"
