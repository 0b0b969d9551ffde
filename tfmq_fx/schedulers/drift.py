r"""What undoes, step by step, how far a quantized sampler has drifted from the float one.

With the quantized sampler's state :math:`\hat x_t`, its model's output :math:`\hat\epsilon_t` and the state that its
step leads to, :math:`\hat x_{t-1}`, each channel of the state is moved by an affine function of what is there anyway:

.. math:: \hat x_{t-1} \leftarrow \hat x_{t-1} + u_t \hat x_t + v_t \hat\epsilon_t + w_t
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.schedulers.timestep_rows import read_json, write_json

__all__ = ["DriftCorrection", "corrected", "terms"]

TENSORS = ("timesteps", "coefficients")


@dataclass(frozen=True, eq=False)
class DriftCorrection:
    """A correction of a quantized sampler's state after each step, for one sampler.

    Attributes:
        scheduler: Class name of the diffusers scheduler.
        prediction: What the model predicts, the scheduler's ``prediction_type``; ``""`` where it has none.
        eta: How stochastic DDIM is; 0 for the other schedulers, which have no such option.
        timesteps: The schedule in order, as often as it visits each, float64 ``[S]``.
        coefficients: ``u_t``, ``v_t`` and ``w_t`` of each channel, float64 ``[S, C, 3]``.
        gain: By how many decibels the last state's squared distance from the float sampler's fell, on the mean of
            trajectories that nothing was fitted on.
    """

    scheduler: str
    prediction: str
    eta: float
    timesteps: Tensor
    coefficients: Tensor
    gain: float

    def save(self, file: str | Path) -> Path:
        """Write the correction as JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return write_json(file, {name: v.tolist() if name in TENSORS else v for name, v in values.items()})

    @classmethod
    def load(cls, file: str | Path) -> DriftCorrection:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file does not hold such a correction.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        values: Mapping[str, Any] = read_json(file, names, "a drift correction")
        return cls(**{**values, **{name: torch.tensor(values[name], dtype=torch.float64) for name in TENSORS}})


def terms(state: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a channel's correction is made of: the state before the step, the model's output, and one; ``[N, C, ...]``.

    Of a model with learned variance, whose output has ``2 C`` channels, the first ``C`` count.
    """
    return state, output[:, : state.shape[1]], torch.ones_like(state)


def corrected(coefficients: Tensor, state: Tensor, output: Tensor, following: Tensor) -> Tensor:
    """``following + u state + v output + w`` with ``coefficients`` ``[C, 3]``, computed in float32 at least."""
    dtype = torch.promote_types(following.dtype, torch.float32)
    shape = (1, -1, *[1] * (following.ndim - 2))
    result = following.to(dtype)
    for factor, term in zip(coefficients.unbind(1), terms(state, output), strict=True):
        result = result + factor.to(result).reshape(shape) * term.to(dtype)
    return result.to(following.dtype)
