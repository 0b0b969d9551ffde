"""The configuration of reconstruction: which weights learn their rounding, against what, for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from tfmq_fx.config.checks import check_choice, check_number, check_whole
from tfmq_fx.config.choices import Granularity, Precision, TemporalObjective
from tfmq_fx.errors import ConfigError

__all__ = ["RECONSTRUCTIONS", "ReconstructionConfig"]

#: The paper's length of training; other lengths scale the step size with it (``learning_rate=None``).
PAPER_ITERATIONS = 20_000
PAPER_LEARNING_RATE = 1e-3
#: Above this, Adam's steps are a tenth of the way between two integers and the schedule turns noisy.
LARGEST_LEARNING_RATE = 3e-2


@dataclass(frozen=True)
class ReconstructionConfig:
    """How weight rounding is learned (AdaRound), unit by unit (BRECQ), the temporal block first (TIAR).

    Attributes:
        granularity: ``"block"``: residual and transformer blocks as a whole, single layers between them
            (BRECQ, ICLR 2021); ``"layer"``: every layer alone (AdaRound, ICML 2020); ``"none"``: only
            the temporal block learns.
        temporal: ``"tiar"``: the temporal block is one unit with its own output as target, over all
            timesteps, then frozen (TFMQ-DM, CVPR 2024, section 5); ``"blocks"``: every embedding layer is
            trained inside the residual block that it feeds, the time embed layer by layer (the baseline of
            that paper); ``"nearest"``: its weights are rounded to nearest. Layers that depend on the timestep and the
            conditioning alone go the same way: with ``"tiar"`` they are a unit that learns over pairs of both.
        iterations: Training steps of every unit but the temporal block.
        temporal_iterations: Training steps of the temporal block, and of the conditional part.
        batch_size: Samples of a mini-batch; the temporal block always takes all timesteps at once.
        learning_rate: Adam's step for the rounding variables; None is the paper's 1e-3 at 20,000
            iterations and grows as the training gets shorter, up to 3e-2, so that every variable can
            still travel from one integer to the next.
        round_weight: Weight of the rounding regulariser (the papers' lambda).
        beta: Exponent of the regulariser at the start and at the end, annealed linearly.
        warmup: Share of the iterations before the regulariser sets in.
        quantized_inputs: Probability that an element of a unit's input comes from the quantized prefix;
            the others come from the float model. 1 is BRECQ, 0.5 QDrop's mixing (ICLR 2022).
        drop_activations: Probability that an element's activation quantization is left out in training
            (QDrop); 0 never.
        fisher: Whether the error of a unit is weighted by the diagonal Fisher information of its output
            (BRECQ, section 3.2).
        learned_steps: Whether activation step sizes are trained together with the weights (LSQ, ICLR
            2020), those of the timestep tables row by row.
        step_learning_rate: Adam's step for the activation step sizes, relative to each step size; annealed
            along a cosine.
        precision: What units other than the temporal block are trained in. ``"bfloat16"`` runs their
            convolutions and matrix products in half the time on CPUs with bfloat16 units; variables, errors
            and what is compared at the end stay float32.
        held_back: Share of the calibration samples that no training sees; a unit whose error on them does
            not fall keeps its weights rounded to nearest.
        seed: Seed of every random choice.

    Raises:
        ConfigError: A value is outside what the field admits.
    """

    granularity: Granularity = "block"
    temporal: TemporalObjective = "tiar"
    iterations: int = PAPER_ITERATIONS
    temporal_iterations: int = PAPER_ITERATIONS
    batch_size: int = 32
    learning_rate: float | None = None
    round_weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    quantized_inputs: float = 1.0
    drop_activations: float = 0.0
    fisher: bool = False
    learned_steps: bool = False
    step_learning_rate: float = 1e-3
    precision: Precision = "float32"
    temporal_precision: Precision = "float32"
    held_back: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("granularity", self.granularity, get_args(Granularity))
        check_choice("temporal", self.temporal, get_args(TemporalObjective))
        check_whole("iterations", self.iterations, 1)
        check_whole("temporal_iterations", self.temporal_iterations, 1)
        check_whole("batch_size", self.batch_size, 1)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 1e-8, 1.0)
        check_number("round_weight", self.round_weight, 0.0, 1e6)
        pair = isinstance(self.beta, (tuple, list)) and len(self.beta) == 2
        if not pair or not all(type(b) in (int, float) for b in self.beta) or not self.beta[0] >= self.beta[1] >= 1:
            msg = f"beta={self.beta!r} must be a pair (start, end) with start >= end >= 1"
            raise ConfigError(msg)
        object.__setattr__(self, "beta", tuple(self.beta))
        check_number("warmup", self.warmup, 0.0, 1.0)
        check_number("quantized_inputs", self.quantized_inputs, 0.0, 1.0)
        check_number("drop_activations", self.drop_activations, 0.0, 1.0)
        check_number("step_learning_rate", self.step_learning_rate, 0.0, 1.0)
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("temporal_precision", self.temporal_precision, get_args(Precision))
        check_number("held_back", self.held_back, 0.0, 0.9)
        check_whole("seed", self.seed, 0)
        check_number("seed", self.seed, 0, 2**32)  # units have seeds of their own, far apart
        if self.granularity == "none" and self.temporal == "blocks":
            msg = (
                "temporal='blocks' trains embedding layers inside their blocks, but granularity='none' trains no block"
            )
            raise ConfigError(msg)

    def rate(self, iterations: int) -> float:
        """The step size of the rounding variables for a training of this many iterations."""
        if self.learning_rate is not None:
            return self.learning_rate
        return min(LARGEST_LEARNING_RATE, PAPER_LEARNING_RATE * max(1.0, PAPER_ITERATIONS / iterations))

    @classmethod
    def of(cls, value: ReconstructionConfig | Mapping[str, Any] | str | None) -> ReconstructionConfig | None:
        """Read what a user may write for ``QuantizationConfig.reconstruction``.

        ``None`` and ``"none"`` mean no reconstruction; ``"tfmq-dm"`` is the default of this class,
        ``"brecq"`` the same without a temporal objective of its own, ``"adaround"`` layer by layer,
        ``"tiar"`` the temporal block alone.

        Raises:
            ConfigError: There is no such name or field.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            check_choice("reconstruction", value, tuple(RECONSTRUCTIONS))
            return RECONSTRUCTIONS[value]
        if not isinstance(value, Mapping):
            msg = f"reconstruction={value!r} must be a ReconstructionConfig, its fields, or a name"
            raise ConfigError(msg)
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(value) - fields):
            msg = f"unknown reconstruction field {unknown[0]!r}; the fields are {', '.join(sorted(fields))}"
            raise ConfigError(msg)
        return cls(**value)


#: The reconstructions that have names.
RECONSTRUCTIONS: dict[str, ReconstructionConfig | None] = {
    "none": None,
    "tfmq-dm": ReconstructionConfig(),
    "brecq": ReconstructionConfig(temporal="blocks"),
    "adaround": ReconstructionConfig(granularity="layer", temporal="blocks"),
    "tiar": ReconstructionConfig(granularity="none"),
}
