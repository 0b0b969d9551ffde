"""Say it, or refuse, where a quantized program is too far from its float model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from tfmq_fx.config.checks import check_number
from tfmq_fx.errors import ConfigError, FidelityError
from tfmq_fx.quantization.fidelity import Fidelity, at_timestep

__all__ = ["WORST_ERROR", "check_fidelity", "check_max_error"]

#: A relative error of a timestep that is worth a warning; zeros in the place of the results have 1. The worst timestep
#: of the bundled model is its last step, whose prediction is small: W8A8 has 0.2 there, W4A8 and W8A6 0.4 to
#: 0.5, W3A8 0.6, and 0.1 or less everywhere else; W2A8 and W4A4 have 1 and more.
WORST_ERROR = 0.7
#: What ``max_error`` may be: from nothing at all to as good as everything.
LARGEST = 1e6
#: Layers that a message names.
MOST_NAMED = 3


def check_max_error(max_error: Any) -> float | None:
    """``max_error``, a number or None; raise :class:`ConfigError` where it is something else."""
    return None if max_error is None else check_number("max_error", max_error, 0.0, LARGEST)


def check_fidelity(
    fidelity: Fidelity | None,
    max_error: float | None,
    layer_errors: Callable[[float | None], Mapping[str, float]],
    *,
    stacklevel: int,
) -> None:
    """Refuse a program whose worst timestep is beyond ``max_error``; without one, warn beyond :data:`WORST_ERROR`.

    Args:
        fidelity: What was measured; None where nothing was.
        max_error: The largest relative error of a timestep that is allowed.
        layer_errors: Gives the relative error of each layer's output at a timestep; called only when it is needed.
        stacklevel: As for ``warnings.warn``, counted from the caller.

    Raises:
        FidelityError: It is beyond ``max_error``.
        ConfigError: There is a ``max_error`` and nothing was measured.
    """
    if fidelity is None:
        if max_error is not None:
            msg = (
                f"max_error={max_error:g} cannot be checked, for no calibration item was kept to measure it on; "
                "calibrate the prepared graph with tfmq_fx.calibrate"
            )
            raise ConfigError(msg)
        return
    worst = fidelity.worst
    if worst.error <= (WORST_ERROR if max_error is None else max_error):
        return
    errors = layer_errors(worst.timestep)
    named = sorted(errors, key=lambda name: -errors[name])[:MOST_NAMED]
    layers = ", ".join(f"{name!r} ({errors[name]:.2g})" for name in named)
    parts = [
        f"the quantized program parts from the float model by a relative error of {worst.error:.2g}"
        + at_timestep(worst.timestep)
        + ("" if max_error is None else f", more than max_error={max_error:g}"),
        f"the layers that are furthest off are {layers}" if layers else "",
        "use more bits, keep layers float (keep_float), give layers a branch of low rank (low_rank) or "
        "learn the rounding (reconstruction)",
    ]
    msg = "; ".join(filter(None, parts))
    if max_error is not None:
        raise FidelityError(msg)
    warnings.warn(msg, stacklevel=stacklevel + 1)
