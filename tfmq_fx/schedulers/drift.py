r"""What undoes, step by step, how far a quantized sampler has drifted from the float one.

With the quantized sampler's state :math:`\hat x_t`, its model's output :math:`\hat\epsilon_t` and the state that its
step leads to, :math:`\hat x_{t-1}`, each channel of the state is moved by an affine function of what is there anyway:

.. math:: \hat x_{t-1} \leftarrow \hat x_{t-1} + u_t \hat x_t + v_t \hat\epsilon_t + w_t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq_fx.data.protocols import Scheduler
from tfmq_fx.frontend.plain_config import plain_config
from tfmq_fx.schedulers.json_tables import TableField, read_json, write_json

__all__ = ["DriftCorrection", "corrected", "sampling_config", "terms"]

FIELDS: Mapping[str, type | TableField] = {
    "scheduler": str, "config": dict, "eta": float, "gain": float,
    "timesteps": TableField(("S",)), "coefficients": TableField(("S", "C", 3)),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class DriftCorrection:
    """A correction of a quantized sampler's state after each step, for one sampler.

    Attributes:
        scheduler: Class name of the diffusers scheduler.
        config: Its configuration: noise schedule, clipping, what the model predicts (:func:`sampling_config`).
        eta: How stochastic DDIM is; 0 for the other schedulers, which have no such option.
        timesteps: The schedule in order, as often as it visits each, float64 ``[S]``.
        coefficients: ``u_t``, ``v_t`` and ``w_t`` of each channel, float64 ``[S, C, 3]``.
        gain: By how many decibels the last state's squared distance from the float sampler's fell, on the mean of
            trajectories that nothing was fitted on.
    """

    scheduler: str
    config: Mapping[str, Any]
    eta: float
    timesteps: Tensor
    coefficients: Tensor
    gain: float

    def save(self, file: str | Path) -> Path:
        """Write the correction as JSON."""
        return write_json(file, {name: getattr(self, name) for name in FIELDS})

    @classmethod
    def load(cls, file: str | Path) -> DriftCorrection:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: The file does not hold such a correction.
        """
        return cls(**read_json(file, FIELDS, "a drift correction"))


def sampling_config(scheduler: Scheduler) -> dict[str, Any]:
    """What of a scheduler's configuration decides what it does; the rest says where it came from."""
    return {name: value for name, value in plain_config(scheduler).items() if not name.startswith("_")}


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
