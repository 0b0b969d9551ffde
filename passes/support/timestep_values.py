r"""The search by value: which row of a table a timestep, or a value of another finite input, belongs to.

This is the only one. :class:`ValueSearch` runs it, and :class:`~.inline_timestep_rows.InlineTimestepRows` writes the
same operators into a graph. With :math:`d_k = |t - v_k|` in float64, row :math:`k` holds :math:`t` when

.. math:: d_k \le \min\bigl(\varepsilon \, |v_k|,\; \tfrac14 \min_{j \ne k} |v_k - v_j|\bigr)

The same timestep is computed in float32 here and in float64 there, so :math:`\varepsilon` is some roundings of float32.
The gap to the next value bounds it: at most one row holds a timestep, and tables may span any range. A timestep of 0 is
0 alone. A timestep in bfloat16 or float16 is held against the values as that dtype has them: a graph that takes it
computes with the rounded number, and so do the rows of its table. Values that the dtype cannot tell apart hold nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError, TimestepError

__all__ = ["LARGEST", "ValueSearch", "as_captured", "distinct_timesteps", "is_low"]

#: Some roundings of float32: a short formula's result in float32 and in float64 is the same timestep.
FLOAT32 = 2.0**-18
#: Of the gap to the next value, the share that belongs to a row.
GAP_SHARE = 0.25
#: What to do about a timestep that a graph does not have: all that a graph by itself can say.
QUANTIZE_WITH_IT = "quantize with it in timesteps=, such as timesteps=tfmq_fx.recorded_timesteps(batches)"
#: A timestep further than this from every value is near none of them: it is infinite, or as good as that.
LARGEST = torch.finfo(torch.float32).max


def distinct_timesteps(values: Any) -> Tensor:
    """The values of a schedule in their order, repeated ones once; float64 ``[K]``.

    Raises:
        ConfigError: One is NaN or infinite, or so small or large that float32 does not hold it in full.
    """
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
        flat = [float(value) for value in tensor.reshape(-1).tolist()]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        msg = f"timesteps must be real numbers that are there, such as scheduler.timesteps: {_first_line(error)}"
        raise ConfigError(msg) from error
    distinct = torch.tensor(list(dict.fromkeys(flat)), dtype=torch.float64)
    # Engines flush what is smaller to zero. Negated, because NaN compares false with everything.
    refused = ~((distinct == 0) | (distinct.abs() >= torch.finfo(torch.float32).tiny) & (distinct.abs() <= LARGEST))
    if bool(refused.any()):
        first = float(distinct[refused][0])
        msg = f"{first:g} cannot stand in a table of timesteps: pass finite numbers of float32's range, or 0"
        raise ConfigError(msg)
    return distinct


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_low(dtype: torch.dtype) -> bool:
    """Whether a float of this type is too short to hold a timestep: bfloat16, float16."""
    return dtype.is_floating_point and dtype.itemsize < 4


def as_captured(values: Tensor, dtype: torch.dtype, name: str = "timestep") -> Tensor:
    """``values`` in the dtype that a graph was captured with.

    Raises:
        ConfigError: A value is fractional, and the dtype has integers only.
    """
    converted = values.to(dtype)
    if not dtype.is_floating_point and values.is_floating_point():
        changed = converted != values
        if bool(changed.any()):
            first, kind = float(values[changed].reshape(-1)[0]), str(dtype).removeprefix("torch.")
            msg = f"{name} {first:g} is fractional, but the graph takes {kind}: capture the model with a float {name}"
            raise ConfigError(msg)
    return converted


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
        self._seen: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def seen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The values as timesteps of this type are held against them, and how far one may lie from each to be it.

        Both float64 ``[K]``.
        """
        dtype = dtype if is_low(dtype) else torch.float64
        if dtype not in self._seen:
            values = self.values.to(dtype).double()
            gaps = _gaps(values)
            tolerances = torch.minimum(values.abs() * FLOAT32, gaps * GAP_SHARE)
            self._seen[dtype] = values, tolerances.masked_fill(gaps == 0, -1.0)
        return self._seen[dtype]

    def find(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The row that holds each timestep.

        Args:
            timestep: Any shape, any dtype.

        Returns:
            The rows, int64, and whether there is one, both of the shape of ``timestep``. Where there is none the row is
            ``K``, behind the last.
        """
        values, tolerances = self.seen(timestep.dtype)
        return self._first(_distances(timestep, values) <= tolerances)

    def nearest(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The row that is nearest to each timestep, of two equally near ones the first; as :meth:`find`.

        Only what is not finite has none.
        """
        distances = _distances(timestep, self.seen(timestep.dtype)[0])
        return self._first(distances <= distances.amin(-1, keepdim=True).clamp_max(LARGEST))

    def rows(self, timestep: Tensor, unknown: str = "error", name: str = "timestep",
             captured: torch.dtype | None = None, advice: str = QUANTIZE_WITH_IT) -> Tensor:  # fmt: skip
        """The row of each timestep, int64, of its shape.

        Args:
            timestep: Any shape, any dtype.
            unknown: What a timestep outside the table does: ``"error"`` names it, ``"nearest"`` takes the closest row.
            name: What the error calls it: ``"timestep"``, or another finite input such as ``"class_labels"``.
            captured: The dtype that the graph computes with, by default that of ``timestep``. What was rounded to
                bfloat16 is another timestep for a graph of float32.
            advice: What the error says to do about a timestep outside the table.

        Raises:
            TimestepError: Names the first timestep without a row, and the ways out.
        """
        rounded = timestep if captured is None else timestep.to(captured if is_low(captured) else torch.float64)
        rows, matched = self.nearest(rounded) if unknown == "nearest" else self.find(rounded)
        if not bool(matched.all()):
            raise TimestepError(self._refusal(timestep[~matched].reshape(-1)[0], name, advice))
        return rows

    def _first(self, matches: Tensor) -> tuple[Tensor, Tensor]:
        """The first row that was found along the last axis."""
        rows = torch.where(matches, self._numbers, len(self.values)).amin(-1)
        return rows, rows < len(self.values)

    def _refusal(self, timestep: Tensor, name: str, advice: str) -> str:
        row, finite = self.nearest(timestep.double())
        if not bool(finite):
            return f"{name} {float(timestep):g} is no finite number, so it has no row in the table; check the scheduler"
        count = len(self.values)
        if name != "timestep":
            first = f"{name} {float(timestep):g}"
            return f"{first} is not among the {count} values in the table; quantize with it in finite="
        first, close = _distinct_texts(float(timestep), float(self.values[row]))
        if is_low(timestep.dtype):
            kind = str(timestep.dtype).removeprefix("torch.")
            return (
                f"timestep {first} in {kind} is not in the table of {count} timesteps (nearest: {close}), and {kind} "
                "rounds timesteps: pass it in float32, or quantize with timesteps=tfmq_fx.recorded_timesteps(batches)"
            )
        return f"timestep {first} is not in the table of {count} timesteps (nearest: {close}); {advice}"


def _distances(timestep: Tensor, values: Tensor) -> Tensor:
    return (timestep.to(torch.float64).unsqueeze(-1) - values).abs()


def _gaps(values: Tensor) -> Tensor:
    """The distance of each value to the next one on either side, ``[K]``; infinite for a value alone."""
    order = values.sort()
    steps = torch.cat([values.new_full((1,), torch.inf), order.values.diff(), values.new_full((1,), torch.inf)])
    return torch.minimum(steps[:-1], steps[1:])[order.indices.argsort()]


def _distinct_texts(one: float, other: float) -> tuple[str, str]:
    """Two different numbers with as many digits as tell them apart."""
    for digits in (6, 9, 17):
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts
