"""What reconstruction did, unit by unit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["ReconstructionReport", "UnitResult"]


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit.

    Attributes:
        name: The unit's name.
        kind: ``"temporal"``, ``"conditional"``, ``"residual"``, ``"layer"`` or ``"whole"``.
        weights: Number of weights whose rounding could be chosen.
        before: Error on held-back samples, rounded to nearest (the temporal block: on all timesteps; the
            conditional part: on pairs of timestep and conditioning).
        after: The same with the chosen rounding; never above ``before``.
        changed: Share of the weights that are not rounded to nearest any more.
        iterations: Training steps, 1 for a layer that GPTQ rounds; 0 when nothing was done.
        seconds: Wall time of this and the checks around it.
        reason: Why the unit was not trained, or its training not kept; ``""`` otherwise.
    """

    name: str
    kind: str
    weights: int = 0
    before: float = 0.0
    after: float = 0.0
    changed: float = 0.0
    iterations: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class ReconstructionReport:
    """The result of :func:`tfmq_fx.reconstruct`.

    Attributes:
        units: One entry per unit, in the order of the graph.
        seconds: Wall time of this run, resumed units counted with the time that they took then.
        peak_cache_bytes: Most memory that cached activations took.
        spilled_bytes: How much of that lay in memory-mapped files.
        resumed: Number of units that came from an earlier, interrupted run.
    """

    units: tuple[UnitResult, ...]
    seconds: float = 0.0
    peak_cache_bytes: int = 0
    spilled_bytes: int = 0
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line per unit."""
        trained = [unit for unit in self.units if unit.iterations]
        lines = [f"{len(trained)} of {len(self.units)} units reconstructed in {self.seconds:.0f} s"]
        for unit in self.units:
            if unit.iterations:
                ratio = unit.after / unit.before if unit.before else 1.0
                outcome = (
                    f"{unit.before:.3g} → {unit.after:.3g} ({ratio:.2f} ×), {unit.changed:.0%} of the roundings changed"
                )
            else:
                outcome = "not trained"
            lines.append(f"  {unit.name} [{unit.kind}]: {outcome}{': ' if unit.reason else ''}{unit.reason}")
        return "\n".join(lines)
