"""Each unit of a run is reconstructed once: in this run, or in an earlier one that was interrupted."""

from __future__ import annotations

from collections.abc import Callable

from tfmq_fx.fake_quantizers import FakeQuantizer
from tfmq_fx.reconstruction.checkpoint import Checkpoint, TrainingState
from tfmq_fx.reconstruction.progress import ReconstructionProgress
from tfmq_fx.reconstruction.report import UnitResult
from tfmq_fx.reconstruction.unit import load_state, state_of

__all__ = ["OnceEach"]


class OnceEach:
    """Keeps the state of finished units and takes it from there.

    Args:
        checkpoint: Where it lies.
        bar: Shows which unit is worked on.

    Attributes:
        resumed: Units that an earlier run had finished.
        earlier_seconds: What these took then.
    """

    def __init__(self, checkpoint: Checkpoint, bar: ReconstructionProgress) -> None:
        self.checkpoint, self.bar = checkpoint, bar
        self.resumed, self.earlier_seconds = 0, 0.0

    def training(self, index: int) -> TrainingState:
        """Where the state of a unit lies while it is trained."""
        return TrainingState(self.checkpoint, index)

    def run(
        self, index: int, name: str, quantizers: dict[str, FakeQuantizer], compute: Callable[[], UnitResult]
    ) -> tuple[UnitResult, bool]:
        """The result of a unit, whose quantizers have its state then.

        Args:
            index: Its number, of its own in the run.
            name: Its name.
            quantizers: All that ``compute`` may change.
            compute: Reconstructs it.

        Returns:
            The result, and whether it was computed now.
        """
        finished = self.checkpoint.load(index)
        if finished is None:
            self.bar.start(name)
            result = compute()
            self.checkpoint.save(index, result, state_of(quantizers))
            return result, True
        result, state = finished
        load_state(quantizers, state)
        self.resumed += 1
        self.earlier_seconds += result.seconds
        self.bar.skip(result.iterations)
        return result, False
