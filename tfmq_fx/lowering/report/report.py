"""The lowering report: which layers run on integer kernels, and why the others do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tfmq_fx.lowering.report.reasons import UNSUPPORTED
from tfmq_fx.quantization.fidelity import Fidelity
from tfmq_fx.temporal.table import TemporalChoice

__all__ = ["LoweringReport", "Measurement", "ReportEntry"]


@dataclass(frozen=True)
class ReportEntry:
    """One layer.

    Attributes:
        name: The path of its module.
        operator: Its operator.
        kernel: What it runs on: ``"integer"`` or ``"float"``.
        reason: Why it stays float.
        eligible: Whether its operands are quantized in a form that there are integer kernels for.
        multiply_adds: How many products it adds up for one item of the batch.
    """

    name: str
    operator: str
    kernel: str
    reason: str = ""
    eligible: bool = False
    multiply_adds: int = 0


@dataclass(frozen=True)
class Measurement:
    """What ``backend="auto"`` found out about a candidate: its median time a call, or why it has none."""

    backend: str
    precision: str | None
    milliseconds: float | None
    reason: str = ""

    def __str__(self) -> str:
        """One line."""
        name = self.backend if self.precision is None else f"{self.backend} ({self.precision})"
        return f"{name}: {self.reason}" if self.milliseconds is None else f"{name}: {self.milliseconds:.2f} ms"


@dataclass(frozen=True)
class LoweringReport:
    """What lowering did to every layer that multiplies.

    Attributes:
        backend: The backend.
        entries: One per layer that multiplies, in graph order.
        temporal_layers: Layers of the temporal block that run at inference; 0 when it is tabulated.
        table_rows: Timesteps in the table.
        parity_error: Relative error of the lowered program against the quantized one, the largest of several calls at
            timesteps from all over the table.
        parity_floor: The same between two runs of the quantized program whose inputs differ by float rounding.
        conditioning: Which layers depend on the timestep and the conditioning alone, in a sentence.
        kernels: Whose integer kernels these are, where a backend has several, and what passes between them.
        measured: With ``backend="auto"``, the candidates that were timed in turn on the example inputs, the fastest
            first, which is the one that was taken; then those that dropped out.
        temporal_choices: With ``temporal="auto"``, whose rows the table holds, feature by feature.
        fidelity: How far the quantized program is from the float model, where conversion could measure it. The lowered
            program has this error and up to ``parity_error`` more.
    """

    backend: str
    entries: tuple[ReportEntry, ...] = field(default=())
    temporal_layers: int = 0
    table_rows: int = 0
    parity_error: float = 0.0
    parity_floor: float = 0.0
    conditioning: str = ""
    kernels: str = ""
    measured: tuple[Measurement, ...] = field(default=())
    temporal_choices: tuple[TemporalChoice, ...] = ()
    fidelity: Fidelity | None = None

    @property
    def eligible(self) -> int:
        """Layers whose operands are quantized in a form that the backend has an integer kernel for."""
        return sum(entry.eligible for entry in self.entries)

    @property
    def integer_kernels(self) -> int:
        """Layers that run on integer kernels."""
        return sum(entry.kernel == "integer" for entry in self.entries)

    @property
    def integer_share(self) -> float | None:
        """The share of the multiply-adds that integer kernels compute; None where they were not counted."""
        total = sum(entry.multiply_adds for entry in self.entries)
        return sum(e.multiply_adds for e in self.entries if e.kernel == "integer") / total if total else None

    @property
    def annotated(self) -> int:
        """Layers with at least one quantized operand."""
        return sum(entry.eligible or entry.reason in UNSUPPORTED for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {
            "backend": self.backend,
            "integer_kernels": self.integer_kernels,
            "eligible": self.eligible,
            "annotated": self.annotated,
            "integer_share": self.integer_share,
            "temporal_layers": self.temporal_layers,
            "table_rows": self.table_rows,
            "parity_error": self.parity_error,
            "parity_floor": self.parity_floor,
            "conditioning": self.conditioning,
            "kernels": self.kernels,
            "measured": [asdict(measurement) for measurement in self.measured],
            "temporal_choices": [choice.to_dict() for choice in self.temporal_choices],
            "entries": [asdict(entry) for entry in self.entries],
        }
        return values if self.fidelity is None else {**values, "fidelity": self.fidelity.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoweringReport:
        """The inverse of :meth:`to_dict`."""
        entries = tuple(ReportEntry(**entry) for entry in values["entries"])
        measured = tuple(Measurement(**measurement) for measurement in values.get("measured", ()))
        names = ("backend", "temporal_layers", "table_rows", "parity_error", "parity_floor", "conditioning")
        choices = tuple(TemporalChoice(**choice) for choice in values.get("temporal_choices", ()))
        scalars = {name: values[name] for name in names} | {"kernels": values.get("kernels", "")}
        fidelity = Fidelity.from_dict(values["fidelity"]) if "fidelity" in values else None
        return cls(entries=entries, measured=measured, temporal_choices=choices, fidelity=fidelity, **scalars)

    def __str__(self) -> str:
        """A summary line, then every layer that stays float with its reason."""
        kernels = f" of {self.kernels}" if self.kernels else ""
        part = self.integer_share
        lost = self.fidelity
        share = "" if part is None else f"{100 * part:.1f} % of the multiply-adds, "
        lines = [
            f"{self.backend}: {self.integer_kernels} of {self.eligible} eligible layers on integer kernels{kernels}, "
            f"{share}"
            f"{self.temporal_layers} temporal layers at run time ({self.table_rows} table rows)",
            f"  compared with the reference: relative error {self.parity_error:.1e} "
            f"(rounding alone: {self.parity_floor:.1e})",
            f"  compared with float: {'not measured, calibrate with tfmq_fx.calibrate' if lost is None else lost}",
        ]
        lines += [f"  conditioning: {self.conditioning}"] if self.conditioning else []
        if self.measured:
            best, *others = self.measured
            lines.append(f"  fastest of {len(self.measured)}, timed in turn, median: {best}")
            lines += [f"    {other}" for other in others]
        lines += [f"  table: {choice}" for choice in self.temporal_choices]
        floats = [entry for entry in self.entries if entry.kernel == "float"]
        lines += [f"  float: {e.name} ({e.operator}{self._part(e)}): {e.reason}" for e in floats]
        return "\n".join(lines)

    def _part(self, entry: ReportEntry) -> str:
        """An entry's share of the multiply-adds, for its line."""
        total = sum(other.multiply_adds for other in self.entries)
        return f", {100 * entry.multiply_adds / total:.1f} %" if entry.multiply_adds else ""
