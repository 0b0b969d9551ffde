"""The operator that turns timesteps, or the values of another finite input, into table rows, by value.

``tfmq_fx::timestep_row(timestep, values, unknown, name)`` returns, for each timestep, the row ``k`` with
``values[k] == timestep`` (floats within :data:`TOLERANCE`). Being a lookup by value it is stateless:
batches may mix timesteps, and solvers may call the model twice a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfmq_fx.errors import TimestepError

__all__ = ["ROW_OP", "TOLERANCE", "check_timesteps", "timestep_row"]

#: How far a float timestep may lie from its table value, relative to ``max(1, |value|)``: schedulers
#: compute the same timestep in float32 and in float64.
TOLERANCE = 1e-4


def _distances(timestep: Tensor, values: Tensor) -> Tensor:
    return (timestep.to(values.dtype).unsqueeze(-1) - values).abs()


def check_timesteps(timestep: Tensor, values: Tensor, name: str = "timestep") -> None:
    """Raise unless every timestep is in the table.

    Args:
        timestep: Any shape, any dtype.
        values: The table's timesteps, shape ``[K]``, float64.
        name: What the error calls it: ``"timestep"``, or another finite input such as ``"class_labels"``.

    Raises:
        TimestepError: Names the first timestep outside the table and the ways out.
    """
    nearest, row = _distances(timestep, values).min(dim=-1)
    # Negated, because a timestep that is not a number compares false with everything.
    unknown = ~(nearest <= TOLERANCE * values[row].abs().clamp_min(1.0))
    if bool(unknown.any()):
        first = timestep[unknown].reshape(-1)[0].item() if timestep.ndim else timestep.item()
        close = values[row[unknown].reshape(-1)[0]].item() if timestep.ndim else values[row].item()
        msg = (
            f"timestep {first:g} is not in the table of {len(values)} timesteps (nearest: {close:g}); "
            "add it with add_timesteps, or quantize with unknown_timestep='nearest'"
        )
        if name != "timestep":
            msg = f"{name} {first:g} is not among the {len(values)} values in the table; quantize with it in finite="
        raise TimestepError(msg)


@torch.library.custom_op("tfmq_fx::timestep_row", mutates_args=())
def timestep_row(timestep: Tensor, values: Tensor, unknown: str, name: str = "timestep") -> Tensor:
    """Row of each timestep in ``values``; int64, the shape of ``timestep``."""
    if unknown == "error":
        check_timesteps(timestep, values, name)
    return _distances(timestep, values).argmin(dim=-1)


@timestep_row.register_fake
def _(timestep: Tensor, values: Tensor, unknown: str, name: str = "timestep") -> Tensor:
    return torch.empty_like(timestep, dtype=torch.int64)


ROW_OP = torch.ops.tfmq_fx.timestep_row.default
