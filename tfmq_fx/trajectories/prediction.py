"""What a denoiser predicts, whatever it wraps it in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
    """
    tensor = output.sample if hasattr(output, "sample") else output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    if tensor.shape[1] == 2 * channels and not keep_variance:
        return tensor[:, :channels]
    return tensor
