r"""The search by value: which row of a table a timestep, or a value of another finite input, belongs to.

This is the only one. :class:`ValueSearch` runs it, and :class:`~.inline_timestep_rows.InlineTimestepRows` writes the
same operators into a graph. With :math:`d_k = |t - v_k|` in float64, row :math:`k` holds :math:`t` when

.. math:: d_k \le \min\bigl(\varepsilon \, |v_k|,\; \tfrac14 \min_{j \ne k} |v_k - v_j|\bigr)

The same timestep is computed in float32 here and in float64 there, so :math:`\varepsilon` is some roundings of float32;
a timestep that was rounded further, to bfloat16 or float16, is matched at the precision it has. The gap to the next
value bounds both: at most one row holds a timestep, and tables may span any range. A timestep of 0 is 0 alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError, TimestepError

__all__ = ["LARGEST", "ValueSearch", "as_captured", "distinct_timesteps", "precision_of"]

#: Some roundings of float32: a short formula's result in float32 and in float64 is the same timestep.
FLOAT32 = 2.0**-18
#: Of the gap to the next value, the share that belongs to a row.
GAP_SHARE = 0.25
#: A timestep further than this from every value is near none of them: it is infinite, or as good as that.
LARGEST = torch.finfo(torch.float32).max


def distinct_timesteps(values: Any) -> Tensor:
    """The values of a schedule in their order, repeated ones once; float64 ``[K]``.

    Raises:
        ConfigError: One is NaN or infinite, or so small or large that float32 does not hold it in full.
    """
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    flat = [float(value) for value in tensor.reshape(-1).tolist()]
    found = torch.tensor(list(dict.fromkeys(flat)), dtype=torch.float64)
    # Engines flush what is smaller to zero. Negated, because NaN compares false with everything.
    refused = ~((found == 0) | (found.abs() >= torch.finfo(torch.float32).tiny) & (found.abs() <= LARGEST))
    if bool(refused.any()):
        first = float(found[refused][0])
        msg = f"{first:g} cannot stand in a table of timesteps: pass finite numbers of float32's range, or 0"
        raise ConfigError(msg)
    return found


def precision_of(dtype: torch.dtype) -> tuple[float, float]:
    """How far a number of this type may lie from what it was rounded from: relative, and for the smallest ones."""
    held = torch.finfo(dtype if dtype.is_floating_point and dtype.itemsize < 4 else torch.float32)
    return max(FLOAT32, held.eps), held.tiny * held.eps / 2


def as_captured(values: Tensor, dtype: torch.dtype, name: str = "timestep") -> Tensor:
    """``values`` in the dtype that a graph was captured with.

    Raises:
        ConfigError: A value is fractional, and the dtype has integers only.
    """
    given = values.to(dtype)
    if not dtype.is_floating_point and values.is_floating_point():
        lost = given != values
        if bool(lost.any()):
            first, kind = float(values[lost].reshape(-1)[0]), str(dtype).removeprefix("torch.")
            msg = f"{name} {first:g} is fractional, but the graph takes {kind}: capture the model with a float {name}"
            raise ConfigError(msg)
    return given


class ValueSearch:
    """The values of a table, ready to be searched.

    Args:
        values: Distinct, in any order, float64 ``[K]``.

    Attributes:
        values: The same.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._numbers = torch.arange(len(values), device=values.device)
        self._gaps = _gaps(values)
        self._tolerances: dict[tuple[float, float], Tensor] = {}

    def tolerance(self, dtype: torch.dtype) -> Tensor:
        """How far a timestep of this type may lie from each value to be it, float64 ``[K]``."""
        relative, smallest = key = precision_of(dtype)
        if key not in self._tolerances:
            near = (self.values.abs() * relative).clamp_min(smallest)
            self._tolerances[key] = torch.minimum(near, self._gaps * GAP_SHARE)
        return self._tolerances[key]

    def find(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The row that holds each timestep.

        Args:
            timestep: Any shape, any dtype; its dtype says how precisely it is known.

        Returns:
            The rows, int64, and whether there is one, both of the shape of ``timestep``. Where there is none the row is
            ``K``, behind the last.
        """
        return self._first(self._distances(timestep) <= self.tolerance(timestep.dtype))

    def nearest(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The row that is nearest to each timestep, of two equally near ones the first; as :meth:`find`.

        Only what is not finite has none.
        """
        distances = self._distances(timestep)
        return self._first(distances <= distances.amin(-1, keepdim=True).clamp_max(LARGEST))

    def rows(self, timestep: Tensor, unknown: str = "error", name: str = "timestep") -> Tensor:
        """The row of each timestep, int64, of its shape.

        Args:
            timestep: Any shape, any dtype.
            unknown: What a timestep outside the table does: ``"error"`` names it, ``"nearest"`` takes the closest row.
            name: What the error calls it: ``"timestep"``, or another finite input such as ``"class_labels"``.

        Raises:
            TimestepError: Names the first timestep without a row, and the ways out.
        """
        rows, known = self.nearest(timestep) if unknown == "nearest" else self.find(timestep)
        if not bool(known.all()):
            raise TimestepError(self._refusal(timestep[~known].reshape(-1)[:1], unknown, name))
        return rows

    def _distances(self, timestep: Tensor) -> Tensor:
        return (timestep.to(torch.float64).unsqueeze(-1) - self.values).abs()

    def _first(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """The first row that was found along the last axis."""
        rows = torch.where(found, self._numbers, len(self.values)).amin(-1)
        return rows, rows < len(self.values)

    def _refusal(self, timestep: Tensor, unknown: str, name: str) -> str:
        row, finite = self.nearest(timestep)
        if not bool(finite):
            return f"{name} {float(timestep):g} is no finite number, so it has no row in the table; check the scheduler"
        if name != "timestep":
            count = len(self.values)
            return (
                f"{name} {float(timestep):g} is not among the {count} values in the table; quantize with it in finite="
            )
        first, close = _told_apart(float(timestep), float(self.values[row]))
        low = timestep.is_floating_point() and timestep.dtype.itemsize < 4
        kind = f" in {str(timestep.dtype).removeprefix('torch.')}" if low else ""
        return (
            f"timestep {first}{kind} is not in the table of {len(self.values)} timesteps (nearest: {close}); "
            "add it with add_timesteps, or lower with unknown_timestep='nearest'"
        )


def _gaps(values: Tensor) -> Tensor:
    """The distance of each value to the next one on either side, ``[K]``; infinite for a value alone."""
    order = values.sort()
    steps = torch.cat([values.new_full((1,), torch.inf), order.values.diff(), values.new_full((1,), torch.inf)])
    return torch.minimum(steps[:-1], steps[1:])[order.indices.argsort()]


def _told_apart(one: float, other: float) -> tuple[str, str]:
    """Two different numbers with as many digits as tell them apart."""
    for digits in (6, 9, 17):
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts
