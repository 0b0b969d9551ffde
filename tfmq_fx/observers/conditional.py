"""The observer of activations that see the timestep and the conditioning, but never the sample."""

from __future__ import annotations

from torch import Tensor

from tfmq_fx.errors import CalibrationError
from tfmq_fx.observers.grouped import nearest_seen
from tfmq_fx.observers.temporal import TimestepObserver

__all__ = ["ConditionalObserver"]


class ConditionalObserver(TimestepObserver):
    """Minimum and maximum per timestep over all conditionings that it is shown, called as ``observer(x, timesteps)``.

    The conditionings are no finite set, as timesteps are: those of the calibration batches stand for them. Numbers of
    timesteps count in the order of noise. The rest is as :class:`TimestepObserver`.
    """

    def observed_ranges(self) -> tuple[Tensor, Tensor]:
        """The ranges ``(lo, hi)``, each ``[K]``; a timestep without observations takes those of the nearest.

        Raises:
            CalibrationError: Nothing was observed.
        """
        if not bool(self.seen.any()):
            msg = "an activation was never observed; calibrate with at least one batch before converting"
            raise CalibrationError(msg)
        nearest = nearest_seen(self.seen)
        return self.low[nearest], self.high[nearest]
