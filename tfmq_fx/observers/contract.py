"""What an observer of activations keeps to, one of another package too: its input passes, its ranges are ranges."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.errors import CalibrationError
from tfmq_fx.observers.finite import input_of

__all__ = ["CheckedObserver"]


class CheckedObserver(ObserverBase):  # type: ignore[misc]  # torchao has no types
    """Holds a subclass to what the stages rely on; without this a fault of it would end in a wrong program."""

    subject: str = input_of("")

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward``.

        Raises:
            CalibrationError: It returned something else than ``x``: what comes behind would see other values.
        """
        result = super().__call__(x, *args, **kwargs)
        if result is not x:
            kind = "another tensor" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            self._refuse(f"its forward returns {kind} instead of the x that it was given; return x itself")
        return result

    def checked_ends(self, ends: Any, size: int) -> tuple[Tensor, Tensor]:
        """The two ends of observed ranges, each ``[size]``; for one range a tensor without axes is taken too.

        Raises:
            CalibrationError: They are something else.
        """
        shapes = [torch.Size([size]), *([torch.Size([])] if size == 1 else [])]
        is_pair = isinstance(ends, (tuple, list)) and len(ends) == 2
        if not is_pair or not all(
            isinstance(end, Tensor) and end.is_floating_point() and end.shape in shapes for end in ends
        ):
            given = f"({', '.join(map(_described, ends))})" if is_pair else _described(ends)
            self._refuse(f"its range is {given}; return two float tensors of shape [{size}], low and high")
        low, high = (end.reshape(size) for end in ends)
        return low, high

    def require_ranges(self, low: Tensor, high: Tensor) -> None:
        """Raise :class:`CalibrationError` unless every range is finite and not reversed."""
        ends = torch.stack((low, high), dim=-1).to(torch.float32)
        wrong = ~ends.isfinite().all(dim=-1) | (low > high)
        if bool(wrong.any()):
            first, last = ends[wrong][0].tolist()
            self._refuse(f"its range is [{first:g}, {last:g}]; return finite ends, the lower one first")

    def _refuse(self, sentence: str) -> NoReturn:
        msg = f"observer {type(self).__name__} of {self.subject}: {sentence}"
        raise CalibrationError(msg)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
