r"""What widths cost and lose, and the best choice under a budget.

A layer quantized alone changes the prediction at timestep :math:`t` by a squared error :math:`e_{lct}`. Together they
are taken to add up, as independent noise does: :math:`E_t = \sum_l e_{lct}`. Under a bound of size or latency

.. math:: \frac{1}{T} \sum_t \frac{E_t}{R_t}

is least, with :math:`R_t` what W8A8 everywhere (the first candidate) loses at that timestep. That is the first order of
:math:`\sum_t \log E_t` around it: no timestep counts more for having a larger error, and none is sacrificed. A bound
of the PSNR is one of :math:`\sum_t E_t`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tfmq_fx.errors import ConfigError
from tfmq_fx.quantization.fidelity import Fidelity
from tfmq_fx.search.budget import Budget
from tfmq_fx.search.latency import LayerTimes
from tfmq_fx.search.layers import SearchLayer
from tfmq_fx.search.sensitivity import Sensitivities
from tfmq_fx.search.solve import least, solve, total
from tfmq_fx.search.widths import Widths

__all__ = ["Choice", "Tradeoff"]

#: Choices of a frontier.
POINTS = 25


@dataclass(frozen=True)
class Choice:
    """Widths of all layers, and what they are predicted to cost and lose.

    Attributes:
        options: For each layer, which of its options.
        size: Bytes of the artefact.
        seconds: Of one step; None where no layer was timed.
        fidelity: The predictions against the float ones.
    """

    options: tuple[int, ...]
    size: float
    seconds: float | None
    fidelity: Fidelity


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """Everything that was measured of a model.

    Attributes:
        layers: The layers.
        sensitivities: What each loses.
        sizes: Per layer the bytes at each option, ``[options]``.
        float_size: Bytes of the float model.
        other_size: Bytes of an artefact without what is counted in ``sizes``.
        times: Seconds of the layers; None where they were not timed.
        base_seconds: Of a step with the widths that all layers have first.
    """

    layers: tuple[SearchLayer, ...]
    sensitivities: Sensitivities
    sizes: tuple[Tensor, ...]
    float_size: int
    other_size: int
    times: LayerTimes | None = None
    base_seconds: float = 0.0

    def uniform(self, widths: Widths) -> Choice:
        """One width for all layers that may have it; the others keep their first."""
        return self.evaluate([self._option(layer, widths) for layer in self.layers])

    def evaluate(self, options: Sequence[int]) -> Choice:
        """What a choice costs and loses."""
        errors = torch.stack([e[o] for e, o in zip(self.sensitivities.errors, options, strict=True)]).sum(0)
        predictions = zip(self.sensitivities.float_predictions, errors.tolist(), strict=True)
        fidelity = Fidelity.of(replace(entry, difference=math.sqrt(error)) for entry, error in predictions)
        assert fidelity is not None
        seconds = None if self.times is None else self.base_seconds + self._extra_seconds(options)
        return Choice(tuple(options), self.other_size + total(self.sizes, options), seconds, fidelity)

    def solve(self, budget: Budget) -> Choice:
        """The best choice under a budget.

        Raises:
            ConfigError: None is within it; the message says what the candidates reach.
        """
        if budget.measure == "psnr":
            allowed = self._squared_error(budget.limit)
            # Layers without weights take no bytes: of equal ones the first, which is not float.
            ranked = [size + torch.arange(len(size)) for size in self.sizes]
            found = solve(ranked, self._sums(), allowed)
        else:
            costs, allowed = self._costs(budget)
            found = solve(self._objective(), costs, allowed)
        if found is None:
            msg = f"budget {budget} cannot be met: {self._reach(budget)}; allow more, or name other candidates"
            raise ConfigError(msg)
        return self.evaluate(found)

    def frontier(self, budget: Budget) -> list[Choice]:
        """The best choices between the cheapest and the best, by size, or by latency where the budget is one of it."""
        costs = self._latencies() if budget.measure == "latency" else self.sizes
        objective = self._sums() if budget.measure == "psnr" else self._objective()
        cheapest, best = total(costs, least(costs)), total(costs, least(objective))
        # Most of what can be gained is gained near the cheapest, so the points are dense there.
        steps = torch.linspace(0, 1, POINTS, dtype=torch.float64).square()
        limits = (cheapest + max(0.0, best - cheapest) * steps).tolist()
        found = (solve(objective, costs, limit * (1 + 1e-9)) for limit in limits)
        return [self.evaluate(options) for options in dict.fromkeys(tuple(o) for o in found if o is not None)]

    def _sums(self) -> list[Tensor]:
        return [errors.sum(1) for errors in self.sensitivities.errors]

    def _objective(self) -> list[Tensor]:
        """Per layer ``[options]``: the mean over timesteps of the errors over those of the first options."""
        reference = torch.stack([errors[0] for errors in self.sensitivities.errors]).sum(0)
        weights = torch.where((reference > 0) & reference.isfinite(), reference.reciprocal(), 0.0)
        if not bool(weights.any()):  # nothing to compare with: all first options are exact, or none is finite
            weights = self.sensitivities.signals.clamp_min(torch.finfo(torch.float64).tiny).reciprocal()
        weighted = [errors * weights / len(weights) for errors in self.sensitivities.errors]
        # Infinite errors stay so where a weight is 0.
        return [part.where(errors.isfinite(), torch.inf).sum(1)
                for part, errors in zip(weighted, self.sensitivities.errors, strict=True)]  # fmt: skip

    def _costs(self, budget: Budget) -> tuple[Sequence[Tensor], float]:
        """What a budget bounds, and by how much."""
        if budget.measure == "size":
            return self.sizes, budget.limit * self.float_size - self.other_size
        times = self._latencies()
        first = sum(float(value[0]) for value in times)
        return times, first + (budget.limit - 1) * self.base_seconds

    def _latencies(self) -> tuple[Tensor, ...]:
        assert self.times is not None
        return self.times.seconds

    def _extra_seconds(self, options: Sequence[int]) -> float:
        times = self._latencies()
        return total(times, options) - sum(float(value[0]) for value in times)

    def _squared_error(self, psnr: float) -> float:
        """The squared norm of the difference that a PSNR stands for, over all predictions."""
        predictions = self.sensitivities.float_predictions
        peak, numbers = max(entry.peak for entry in predictions), sum(entry.numbers for entry in predictions)
        return peak**2 * numbers * 10 ** (-psnr / 10)

    def _reach(self, budget: Budget) -> str:
        if budget.measure == "psnr":
            best = self.evaluate(least(self._sums()))
            return f"the most that these candidates reach is a PSNR of {best.fidelity.psnr:.1f} dB"
        costs, _ = self._costs(budget)
        low, high = (self.evaluate(least([sign * value for value in costs])) for sign in (1, -1))
        if budget.measure == "size":
            ends = (choice.size / self.float_size for choice in (low, high))
        else:
            ends = ((choice.seconds or 0.0) / self.base_seconds for choice in (low, high))
        return "these candidates reach from {:.3g}x to {:.3g}x".format(*ends)

    @staticmethod
    def _option(layer: SearchLayer, widths: Widths) -> int:
        own = [i for i, o in enumerate(layer.options) if o == widths]
        alike = [i for i, o in enumerate(layer.options) if o.activation_bits == widths.activation_bits]
        return next(iter(own or ([] if layer.weights else alike)), 0)
