r"""Temporal information mismatch: which timestep a quantized temporal feature speaks of.

.. math:: t^* = \arg\max_{t'} \cos(\widehat{emb}_{t,i}, emb_{t',i}), \qquad \delta_t = t^* - t

TFMQ-DM (CVPR 2024, section 4): when ``delta`` is not 0, the denoiser is told another time than the one it is
at. The second view takes the nearest feature instead of the most similar one, so it sees lengths too. All
in float64: neighbouring timesteps are very close to each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from tfmq_fx.diagnostics.features import TemporalFeatures, align_features, temporal_features
from tfmq_fx.diagnostics.json_values import numbers, tensor
from tfmq_fx.diagnostics.vectors import cosine_of_chord, distances, unit
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["TemporalMismatch", "find_mismatch", "match_timesteps", "temporal_mismatch"]

Measure = Literal["cosine", "distance"]


@dataclass(frozen=True, eq=False)
class TemporalMismatch:
    """The timestep that each quantized temporal feature is taken for.

    Attributes:
        measure: ``"cosine"``, the most similar float feature, as in the paper; ``"distance"``, the nearest.
        layers: Names of the ``L`` layers.
        timesteps: The right timesteps, float64 ``[T]``.
        matched: The timesteps ``t*`` that the features are taken for, float64 ``[T, L]``.
        margin: How far the best wrong timestep is behind the right one, float64 ``[T, L]``: the difference
            of the cosines, or of the distances over the norm of the right float feature. Negative where
            a wrong one wins.
    """

    measure: Measure
    layers: tuple[str, ...]
    timesteps: Tensor
    matched: Tensor
    margin: Tensor

    @property
    def delta(self) -> Tensor:
        """``t* - t`` in units of the timestep, float64 ``[T, L]``."""
        return self.matched - self.timesteps[:, None]

    @property
    def share_right(self) -> float:
        """The share of features, over timesteps and layers, whose ``delta`` is 0.

        It depends on the timesteps to choose from: those of a sampling schedule lie far apart and are told apart even
        after rounding to nearest; among all timesteps of training, the next one is the hardest to tell apart.
        """
        return (self.delta == 0).double().mean().item()

    @property
    def mean_shift(self) -> float:
        """The mean of ``|delta|``, in units of the timestep."""
        return self.delta.abs().mean().item()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the two summary numbers included."""
        return {
            "measure": self.measure,
            "share_right": self.share_right,
            "mean_shift": self.mean_shift,
            "layers": list(self.layers),
            "timesteps": numbers(self.timesteps),
            "matched": numbers(self.matched),
            "margin": numbers(self.margin),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TemporalMismatch:
        """The inverse of :meth:`to_dict`."""
        return cls(
            measure=values["measure"],
            layers=tuple(values["layers"]),
            timesteps=tensor(values["timesteps"]),
            matched=tensor(values["matched"]),
            margin=tensor(values["margin"]),
        )


def match_timesteps(features: Tensor, quantized: Tensor, measure: Measure = "cosine") -> tuple[Tensor, Tensor]:
    """Find the row of ``features`` that each row of ``quantized`` is most like.

    Args:
        features: Float features, one row per timestep, ``[T, C]``.
        quantized: Quantized features of the same timesteps, ``[T, C]``.
        measure: ``"cosine"`` or ``"distance"``.

    Returns:
        The most similar rows, int64 ``[T]``, and the margins of the right ones, float64 ``[T]``. The right row wins
        a tie, so that features which do not change with the timestep count as right.

    Raises:
        ConfigError: The measure is unknown, or there are fewer than two timesteps to choose from.
    """
    if measure not in get_args(Measure):
        msg = f"measure={measure!r} is not supported: use 'cosine' or 'distance'"
        raise ConfigError(msg)
    count = len(features)
    if count < 2:
        msg = "a mismatch needs at least two timesteps to choose from"
        raise ConfigError(msg)
    if measure == "cosine":
        u, v = unit(quantized), unit(features)
        # The sign makes it a cost, smallest for the most similar.
        cost = -cosine_of_chord(u, v, distances(u, v))
        scale = torch.ones(count, dtype=torch.float64)
    else:
        cost = distances(quantized, features)
        scale = features.double().norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    right = cost.diagonal().clone()
    wrong, row = cost.fill_diagonal_(torch.inf).min(dim=1)
    return torch.where(wrong < right, row, torch.arange(count)), (wrong - right) / scale


@in_plain_surroundings
def find_mismatch(
    features: TemporalFeatures, quantized: TemporalFeatures, measure: Measure = "cosine"
) -> TemporalMismatch:
    """Find the timestep that every quantized temporal feature is taken for.

    Args:
        features: Those of the float graph, at all timesteps that come into question.
        quantized: Those of the quantized one at the same timesteps.
        measure: ``"cosine"`` or ``"distance"``.

    Raises:
        ConfigError: They are not of the same model and timesteps, or of fewer than two timesteps.

    Source: TFMQ-DM (CVPR 2024), section 4, "temporal information mismatch"; the distance is ours.
    """
    quantized = align_features(features, quantized)
    matches = [match_timesteps(x, y, measure) for x, y in zip(features.values, quantized.values, strict=True)]
    rows, margins = (torch.stack(parts, dim=1) for parts in zip(*matches, strict=True))
    return TemporalMismatch(measure, features.layers, features.timesteps, features.timesteps[rows], margins)


@in_plain_surroundings
def temporal_mismatch(
    captured: fx.GraphModule,
    quantized: fx.GraphModule | QuantizedProgram,
    timesteps: Tensor | Iterable[float] | None = None,
    *,
    measure: Measure = "cosine",
    timestep: str = "timestep",
) -> TemporalMismatch:
    """Find the mismatch between a float graph and a quantized one, at any timesteps.

    Args:
        captured: The float graph.
        quantized: A quantized program, or another graph of the same model.
        timesteps: The timesteps, which are also those to choose from: ``range(1000)`` for the whole training
            schedule. By default those of the program's table.
        measure: ``"cosine"`` or ``"distance"``.
        timestep: Name of the timestep input; a program knows its own.

    Raises:
        ConfigError: A graph has no temporal block, they are of different models, or there are too few timesteps.

    Source: TFMQ-DM (CVPR 2024), section 4, "temporal information mismatch"; the distance is ours.
    """
    timestep = quantized.timestep if isinstance(quantized, QuantizedProgram) else timestep
    quantized_features = temporal_features(quantized, timesteps, timestep=timestep)
    features = temporal_features(captured, quantized_features.timesteps, timestep=timestep)
    return find_mismatch(features, quantized_features, measure)
