"""What a plan is made from: what the caller asks for, and what the backend can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tfmq_fx.errors import LoweringError

__all__ = ["BackendSupport", "LoweringOptions"]


@dataclass(frozen=True)
class LoweringOptions:
    """What the caller of :func:`tfmq_fx.lower` asks for.

    Attributes:
        tabulate: Whether the temporal block becomes a table.
        reuse: Whether stages that the sample does not reach are cut out, where the backend can run stages.
        path: The package to write, for a backend that writes one.
        precision: What passes between integer kernels, ``"bf16"`` or ``"f32"``; None until the backend has resolved it.

    Raises:
        LoweringError: ``tabulate`` or ``reuse`` is no bool.
    """

    tabulate: bool = True
    reuse: bool = True
    path: Path | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for name in ("tabulate", "reuse"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                msg = f"{name}={value!r} must be True or False"
                raise LoweringError(msg)


@dataclass(frozen=True)
class BackendSupport:
    """What a backend can do; a plan is made to fit it.

    Attributes:
        mixed_groups: Whether one call may mix timestep groups, as can computing quantize/dequantize in float, our own
            integer kernels, which take the row of each item, and engines that have items scaled outside their layers.
            Others take one activation scale a call: their graph is written for one group, and the denoiser splits.
        stages: Whether it compiles stages, whose values are kept from call to call.
        compared: Whether its results are compared with the quantized program's; False for what computes just that.
    """

    mixed_groups: bool = False
    stages: bool = False
    compared: bool = True
