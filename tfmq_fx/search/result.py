"""What a search found: the configuration, what was predicted, and what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.quantization.fidelity import Fidelity
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.search.budget import Budget
from tfmq_fx.search.tradeoff import Choice, Tradeoff
from tfmq_fx.search.widths import Widths

__all__ = ["LayerSensitivity", "Measured", "SearchResult"]


@dataclass(frozen=True)
class Measured:
    """What a program that was quantized really costs and loses.

    Attributes:
        size: Bytes of its artefact.
        seconds: Of one step; None where no latency was asked for.
        fidelity: Its predictions against the float ones, on the items that were kept back.
    """

    size: int
    seconds: float | None
    fidelity: Fidelity


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer loses and takes, alone.

    Attributes:
        name: Its name.
        widths: What it may have.
        errors: For each, the relative error of the prediction over all timesteps with this layer alone quantized.
        sizes: For each, its bytes.
        chosen: What the search chose.
    """

    name: str
    widths: tuple[Widths, ...]
    errors: tuple[float, ...]
    sizes: tuple[int, ...]
    chosen: Widths


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of :func:`tfmq_fx.search_bits`.

    Attributes:
        budget: The budget.
        config: The configuration that was found, its ``overrides`` being the widths.
        program: The model quantized with it.
        tradeoff: Everything that was measured of the layers.
        choice: What was chosen, and predicted of it.
        measured: What was measured of ``program``.
        base: What was measured of the first candidate everywhere.
        frontier: The best choices between the cheapest and the best, as they are predicted.
        uniform: One width everywhere, as predicted, by name.
    """

    budget: Budget
    config: QuantizationConfig
    program: QuantizedProgram
    tradeoff: Tradeoff
    choice: Choice
    measured: Measured
    base: Measured
    frontier: tuple[Choice, ...]
    uniform: dict[str, Choice]

    @property
    def layers(self) -> list[LayerSensitivity]:
        """Every layer, the most sensitive first: by the largest finite error that one of its widths has."""
        found = self.tradeoff.sensitivities
        signal = float(found.signals.sum()) or math.inf
        entries = []
        for layer, errors, sizes, option in zip(
            self.tradeoff.layers, found.errors, self.tradeoff.sizes, self.choice.options, strict=True
        ):
            relative = tuple((errors.sum(1) / signal).sqrt().tolist())
            own = tuple(int(size) for size in sizes.tolist())
            entries.append(LayerSensitivity(layer.name, layer.options, relative, own, layer.options[option]))
        return sorted(entries, key=lambda entry: -max((e for e in entry.errors if math.isfinite(e)), default=0.0))

    def counts(self) -> dict[str, int]:
        """How many layers have each width; those without weights by that of their inputs."""
        names = [_label(layer.options[option], bool(layer.weights))
                 for layer, option in zip(self.tradeoff.layers, self.choice.options, strict=True)]  # fmt: skip
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is infinite is null."""
        times = self.tradeoff.times
        return {
            "budget": str(self.budget),
            "config": self.config.to_dict(),
            "float_bytes": self.tradeoff.float_size,
            "predicted": _choice(self.choice),
            "measured": _measured(self.measured),
            "base": _measured(self.base),
            "frontier": [_choice(choice) for choice in self.frontier],
            "uniform": {name: _choice(choice) for name, choice in self.uniform.items()},
            "untimed": [] if times is None else list(times.untimed),
            "layers": [
                {
                    "name": entry.name,
                    "chosen": str(entry.chosen),
                    "options": {
                        str(widths): {"error": _finite(error), "bytes": size}
                        for widths, error, size in zip(entry.widths, entry.errors, entry.sizes, strict=True)
                    },
                }
                for entry in self.layers
            ],
        }

    def __str__(self) -> str:
        """Lines: what was chosen, predicted and measured."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        lines = [f"{self.budget}: {counts}"]
        lines += [_line("predicted", self.choice, self.tradeoff), _line("measured", self.measured, self.tradeoff)]
        return "\n".join([*lines, _line(f"{self.tradeoff.layers[0].options[0]} everywhere", self.base, self.tradeoff)])


def _line(name: str, costs: Choice | Measured, tradeoff: Tradeoff) -> str:
    time = "" if costs.seconds is None else f", {1e3 * costs.seconds:.2f} ms a step"
    return f"  {name}: {costs.size / tradeoff.float_size:.3f} × the float size{time}, {costs.fidelity}"


def _label(widths: Widths, weighted: bool) -> str:
    return str(widths) if weighted or widths.is_float else f"a{widths.activation_bits}"


def _choice(choice: Choice) -> dict[str, Any]:
    return {"bytes": choice.size, "seconds": choice.seconds, "psnr": _finite(choice.fidelity.psnr),
            "fidelity": choice.fidelity.to_dict()}  # fmt: skip


def _measured(measured: Measured) -> dict[str, Any]:
    return {"bytes": measured.size, "seconds": measured.seconds, "psnr": _finite(measured.fidelity.psnr),
            "fidelity": measured.fidelity.to_dict()}  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
