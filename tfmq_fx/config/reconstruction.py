"""The configuration of reconstruction: which weights learn their rounding, against what, for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from tfmq_fx.config.checks import (
    check_choice,
    check_fields,
    check_number,
    check_pair,
    check_switch,
    check_whole,
    shown,
)
from tfmq_fx.config.choices import (
    FeatureObjective,
    Granularity,
    LearnedSteps,
    Precision,
    RoundingMethod,
    TemporalObjective,
)
from tfmq_fx.errors import ConfigError

__all__ = ["RECONSTRUCTIONS", "ReconstructionConfig"]

#: The paper's length of training; other lengths scale the step size with it (``learning_rate=None``).
PAPER_ITERATIONS = 20_000
PAPER_LEARNING_RATE = 1e-3
#: Where all weights are trained together. Adapters move a weight by some hundredths of its step at a time; weights that
#: are trained themselves cross from one integer to the next all at once if it is much larger.
WHOLE_MODEL_RATES = {"adapters": 3e-3, "distillation": 7e-4}
#: Above this, Adam's steps are a tenth of the way between two integers and the schedule turns noisy.
LARGEST_LEARNING_RATE = 3e-2


_share = partial(check_number, low=0.0, high=1.0)
_steps = partial(check_whole, least=1)


def _rate(name: str, value: Any) -> float | None:
    return None if value is None else check_number(name, value, 1e-8, 1.0)


#: What every field is checked with; what a check returns is kept.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "method": partial(check_choice, choices=get_args(RoundingMethod)),
    "granularity": partial(check_choice, choices=get_args(Granularity)),
    "temporal": partial(check_choice, choices=get_args(TemporalObjective)),
    "temporal_objective": partial(check_choice, choices=get_args(FeatureObjective)),
    "iterations": _steps,
    "temporal_iterations": _steps,
    "batch_size": _steps,
    "learning_rate": _rate,
    "round_weight": partial(check_number, low=0.0, high=1e6),
    "beta": check_pair,
    "warmup": _share,
    "quantized_inputs": _share,
    "drop_activations": _share,
    "fisher": check_switch,
    "learned_steps": partial(check_choice, choices=get_args(LearnedSteps)),
    "step_share": partial(check_number, low=0.0, high=10.0),
    "step_learning_rate": _share,
    "precision": partial(check_choice, choices=get_args(Precision)),
    "temporal_precision": partial(check_choice, choices=get_args(Precision)),
    "adapter_rank": _steps,
    "damping": partial(check_number, low=1e-6, high=10.0),
    "held_back": partial(check_number, low=0.0, high=0.9),
    "seed": partial(check_whole, least=0, most=2**32),  # units have seeds of their own, far apart
}


@dataclass(frozen=True)
class ReconstructionConfig:
    """How weights are rounded: learned (AdaRound), unit by unit (BRECQ), the temporal block first (TIAR), or by GPTQ.

    Activations are quantized while the weights of a unit learn, so that the rounding makes up for them too; the papers
    and their code train all weights with float activations first and quantize activations behind them.

    Attributes:
        method: ``"adaround"`` trains the choice of every weight. ``"gptq"`` (ICLR 2023) trains nothing: layer by layer,
            it rounds one input column after the other and makes up for the error in those that follow. Of the other
            fields it takes ``granularity`` (``"none"`` for the temporal block alone, else ``"layer"``), ``temporal``,
            ``temporal_objective``, ``damping``, ``held_back`` and ``seed``. ``"adapters"`` does the same, then trains
            all weights together, each as ``Q(W + B A)``, and the activations' step sizes, against the float model's
            prediction (EfficientDM, ICLR 2024); it takes ``iterations``, ``batch_size``, ``learning_rate`` (of
            adapters, in steps of their weights), ``step_learning_rate`` and ``adapter_rank`` too.
            ``"distillation"`` trains every weight itself and the scales of weights in the same way, with
            ``learning_rate`` in steps of weights. ``"nearest"`` rounds every weight to nearest: no reconstruction.
        granularity: ``"block"``: residual and transformer blocks as a whole, single layers between them
            (BRECQ, ICLR 2021); ``"layer"``: every layer alone (AdaRound, ICML 2020); ``"none"``: only
            the temporal block learns.
        temporal: ``"tiar"``: the temporal block is one unit with its own output as target, over all
            timesteps, then frozen (TFMQ-DM, CVPR 2024, section 5); ``"blocks"``: every embedding layer is
            trained inside the residual block that it feeds, the time embed layer by layer (the baseline of
            that paper); ``"nearest"``: its weights are rounded to nearest. Layers that depend on the timestep and the
            conditioning alone go the same way: with ``"tiar"`` they are a unit that learns over pairs of both.
        temporal_objective: With ``temporal="tiar"``, what the temporal block is rounded by. ``"features"``: the sum of
            the squared errors of all its features (the paper's); trained, or with GPTQ layer by layer.
            ``"prediction"``: how far these errors move the model's result on calibration batches, which takes
            seconds and no training (:mod:`tfmq_fx.reconstruction.time_path_prediction`). None is ``"prediction"`` with
            ``method="adaround"`` where there are batches, step sizes are not learned and the block allows it, else
            ``"features"``. The part that depends on a conditioning always learns by its features.
        iterations: Training steps of every unit but the temporal block.
        temporal_iterations: Training steps of the temporal block by its features, and of the conditional part.
        batch_size: Samples of a mini-batch, and timesteps of one where the temporal block learns by its features.
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
        learned_steps: Whether activation step sizes are trained (LSQ, ICLR 2020), those of the timestep tables row by
            row: True, together with the weights; ``"after"``, behind them, unit by unit, when their rounding is
            final, against the error in the 2.4 norm (the public code of BRECQ and Q-Diffusion).
        step_share: With ``learned_steps="after"``, training steps of the step sizes relative to those of the weights
            before: Q-Diffusion's 5,000 after 20,000.
        step_learning_rate: Adam's step for the activation step sizes, relative to each step size; annealed
            along a cosine.
        precision: What units other than the temporal block are trained in. ``"bfloat16"`` runs their
            convolutions and matrix products in half the time on CPUs with bfloat16 units; variables, errors
            and what is compared at the end stay float32.
        adapter_rank: Rank of the adapters of ``method="adapters"``.
        damping: What GPTQ adds to the diagonal of its Hessian, relative to the mean of the diagonal.
        held_back: Share of the calibration samples that no training sees; a unit whose error on them does
            not fall keeps its weights rounded to nearest.
        seed: Seed of every random choice.

    Raises:
        ConfigError: A value is of another type than its field or outside what it admits.
    """

    method: RoundingMethod = "adaround"
    granularity: Granularity = "block"
    temporal: TemporalObjective = "tiar"
    temporal_objective: FeatureObjective = None
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
    learned_steps: LearnedSteps = False
    step_share: float = 0.25
    step_learning_rate: float = 1e-3
    precision: Precision = "float32"
    temporal_precision: Precision = "float32"
    adapter_rank: int = 32
    damping: float = 0.01
    held_back: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.rounds_columns and self.granularity == "block":
            object.__setattr__(self, "granularity", "layer")
        if self.temporal_objective == "prediction" and (self.learned_steps or self.temporal != "tiar"):
            msg = "temporal_objective='prediction' needs temporal='tiar', and learned_steps=False: it trains nothing"
            raise ConfigError(msg)
        if self.granularity == "none" and self.temporal == "blocks":
            msg = (
                "temporal='blocks' trains embedding layers inside their blocks, but granularity='none' trains no block"
            )
            raise ConfigError(msg)

    @property
    def resolved_temporal_objective(self) -> FeatureObjective:
        """``temporal_objective`` with its default filled in, where there are batches."""
        trains = self.method == "adaround" and not self.learned_steps
        return self.temporal_objective or ("prediction" if trains and self.temporal == "tiar" else "features")

    def step_iterations(self, iterations: int) -> int:
        """Training steps of the step sizes behind a training of the weights of this many."""
        return round(self.step_share * iterations) if self.learned_steps == "after" else 0

    @property
    def rounds_columns(self) -> bool:
        """Whether GPTQ rounds the layers."""
        return self.method in ("gptq", *WHOLE_MODEL_RATES)

    @property
    def trains_whole_model(self) -> bool:
        """Whether all weights are trained together behind GPTQ."""
        return self.method in WHOLE_MODEL_RATES

    @property
    def whole_model_rate(self) -> float:
        """The step size of what is trained of weights where the whole model is, in steps of these weights."""
        return WHOLE_MODEL_RATES[self.method] if self.learning_rate is None else self.learning_rate

    def rate(self, iterations: int) -> float:
        """The step size of the rounding variables for a training of this many iterations."""
        if self.learning_rate is not None:
            return self.learning_rate
        return min(LARGEST_LEARNING_RATE, PAPER_LEARNING_RATE * max(1.0, PAPER_ITERATIONS / iterations))

    @classmethod
    def of(cls, value: ReconstructionConfig | Mapping[str, Any] | str | None) -> ReconstructionConfig | None:
        """Read what a user may write for ``QuantizationConfig.reconstruction``.

        ``None`` leaves the choice to ``QuantizationConfig.resolved_reconstruction``; ``"nearest"`` (or ``"none"``)
        rounds to nearest; ``"gptq"`` trains nothing; ``"efficientdm"`` trains all weights together behind it, by
        adapters of low rank, and ``"distillation"`` every weight itself;
        ``"tfmq-dm"`` is the default of this class, ``"brecq"`` the same without a temporal objective of its own,
        ``"adaround"`` layer by layer, ``"tiar"`` the temporal block alone.

        Raises:
            ConfigError: There is no such name or field.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            check_choice("reconstruction", value, tuple(RECONSTRUCTIONS))
            return RECONSTRUCTIONS[value]
        if not isinstance(value, Mapping):
            msg = f"reconstruction={shown(value)} must be a ReconstructionConfig, its fields, or a name"
            raise ConfigError(msg)
        return cls(**check_fields(value, CHECKS, "reconstruction"))


#: The reconstructions that have names.
RECONSTRUCTIONS: dict[str, ReconstructionConfig] = {
    "nearest": ReconstructionConfig(method="nearest"),
    "none": ReconstructionConfig(method="nearest"),
    "gptq": ReconstructionConfig(method="gptq"),
    "efficientdm": ReconstructionConfig(method="adapters", iterations=1000, batch_size=16, step_learning_rate=5e-3),
    "distillation": ReconstructionConfig(method="distillation", iterations=3000, step_learning_rate=5e-3),
    "tfmq-dm": ReconstructionConfig(),
    "brecq": ReconstructionConfig(temporal="blocks"),
    "adaround": ReconstructionConfig(granularity="layer", temporal="blocks"),
    "tiar": ReconstructionConfig(granularity="none"),
}
