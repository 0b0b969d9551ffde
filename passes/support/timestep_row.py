"""The operator that turns timesteps, or the values of another finite input, into table rows, by value.

``tfmq_fx::timestep_row(timestep, values, unknown, name)`` returns, for each timestep, the row ``k`` of ``values`` that
holds it (:class:`~.timestep_values.ValueSearch`). Being a lookup by value it is stateless: batches may mix timesteps,
and solvers may call the model twice a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq_fx.passes.support.timestep_values import ValueSearch

__all__ = ["ROW_OP", "check_timesteps", "timestep_row"]


def check_timesteps(timestep: Tensor, values: Tensor, name: str = "timestep") -> None:
    """Raise unless every timestep is in the table.

    Args:
        timestep: Any shape, any dtype.
        values: The table's timesteps, shape ``[K]``, float64.
        name: What the error calls it: ``"timestep"``, or another finite input such as ``"class_labels"``.

    Raises:
        TimestepError: Names the first timestep outside the table and the ways out.
    """
    ValueSearch(values).rows(timestep, "error", name)


@torch.library.custom_op("tfmq_fx::timestep_row", mutates_args=())
def timestep_row(timestep: Tensor, values: Tensor, unknown: str, name: str = "timestep") -> Tensor:
    """Row of each timestep in ``values``; int64, the shape of ``timestep``."""
    return ValueSearch(values).rows(timestep, unknown, name)


@timestep_row.register_fake
def _(timestep: Tensor, values: Tensor, unknown: str, name: str = "timestep") -> Tensor:
    return torch.empty_like(timestep, dtype=torch.int64)


ROW_OP = torch.ops.tfmq_fx.timestep_row.default
