r"""The choice of widths as an integer program.

.. math::

    \min_x \sum_{l, c} e_{lc} x_{lc} \quad \text{with} \quad
    \sum_c x_{lc} = 1, \quad \sum_{l, c} k_{lc} x_{lc} \le K, \quad x_{lc} \in \{0, 1\}

for the objective :math:`e` and the bounded quantity :math:`k` of each layer :math:`l` at each of its widths :math:`c`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["least", "solve", "total"]

#: What a sum may be beyond the bound, relative to it, for it is rounded.
ROUNDING = 1e-12
#: How far below the bound the solver is to stay where it went beyond: it takes a millionth for rounding.
MARGIN = 2e-6
#: How close to the best it comes, relative to it, and when it stops with what it has.
GAP, SECONDS = 1e-6, 20.0


def total(values: Sequence[Tensor], choice: Sequence[int]) -> float:
    """The sum of what is chosen, from ``[options]`` for each layer."""
    return sum(float(value[option]) for value, option in zip(values, choice, strict=True))


def least(values: Sequence[Tensor]) -> list[int]:
    """The options with the least of ``values``, of equal ones the first."""
    return [int(value.argmin()) for value in values]


def solve(objective: Sequence[Tensor], bounded: Sequence[Tensor], limit: float) -> list[int] | None:
    """One option for each layer: the least sum of ``objective`` with a sum of ``bounded`` within ``limit``.

    Args:
        objective: Per layer float64 ``[options]``; an option with an infinite one is never chosen.
        bounded: Likewise.
        limit: The bound.

    Returns:
        The options, or None where no choice is within the bound.
    """
    cost, weight = torch.cat(list(objective)).double(), torch.cat(list(bounded)).double()
    usable = cost.isfinite() & weight.isfinite()
    parts = _split(usable, bounded)
    within = [values.double().where(part, torch.inf) for values, part in zip(bounded, parts, strict=True)]
    lowest = [_least_then(*pair) for pair in zip(within, objective, strict=True)]
    room = limit + ROUNDING * abs(limit) - total(within, lowest)
    # Not (room < 0): it is minus infinity where no option of a layer can be used, and NaN with an infinite limit.
    if not room >= 0:
        return None
    # Counted from the least, in units of what there is to spend: the solver's tolerances are absolute. What no choice
    # has room for is left out: it would only widen the range of the numbers.
    owner = torch.cat([torch.full((len(values),), layer) for layer, values in enumerate(objective)])
    offsets = torch.stack([values[option] for values, option in zip(within, lowest, strict=True)])
    spend = weight - offsets[owner]
    usable &= spend <= room
    cost, spend = cost.where(usable, 0.0), spend.where(usable, 0.0)
    one_each = owner[None] == torch.arange(len(objective))[:, None]
    for share in (1.0, 1.0 - MARGIN):
        found = _milp(cost / _largest(cost), spend / _largest(spend), share * room / _largest(spend), one_each, usable)
        if found is None:
            break
        chosen = [int(part.argmax()) for part in _split(found, objective)]
        if total(_split(spend, objective), chosen) <= room:
            return chosen
    return lowest


def _milp(cost: Tensor, spend: Tensor, room: float, one_each: Tensor, usable: Tensor) -> Tensor | None:
    """The solver's answer, float64 ``[all options]``; None where it has none."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    found = milp(
        cost.numpy(),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, usable.double().numpy()),
        constraints=[
            LinearConstraint(one_each.double().numpy(), 1, 1),
            LinearConstraint(spend.numpy()[None], -np.inf, room),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    return None if found.x is None else torch.from_numpy(found.x)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) or 1.0


def _split(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(flat, [len(values) for values in like])


def _least_then(values: Tensor, objective: Tensor) -> int:
    """The option with the least of ``values``, of equal ones that with the least ``objective``."""
    return int(objective.double().where(values == values.min(), torch.inf).argmin())
