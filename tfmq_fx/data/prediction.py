"""What a denoiser predicts, whatever it wraps it in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tfmq_fx.errors import CalibrationError

__all__ = ["predicted"]


def predicted(output: Any, channels: int, *, keep_variance: bool = False) -> Tensor:
    """The prediction of a denoiser: an output object's ``sample``, a tuple's first entry, or the tensor itself.

    Args:
        output: What the model returned.
        channels: Channels of the model's sample. A model with learned variance predicts twice as many;
            the second half is the variance.
        keep_variance: Whether that second half stays, for schedulers that read it.

    Returns:
        The prediction, ``[N, channels, ...]``, or ``[N, 2 * channels, ...]`` with its variance.

    Raises:
        CalibrationError: There is no tensor in the output.
    """
    tensor = output.sample if hasattr(output, "sample") else output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        msg = (
            f"the denoiser returned a {type(output).__name__}, in which no tensor is found; it must return a tensor, a "
            "tuple that begins with one, or an object with one as its sample"
        )
        raise CalibrationError(msg)
    if tensor.shape[1] == 2 * channels and not keep_variance:
        return tensor[:, :channels]
    return tensor
