"""What the quality benchmark compares: methods of quantization, and bit widths."""

from __future__ import annotations

from typing import Any

from tfmq_fx import QuantizationConfig, ReconstructionConfig
from tfmq_fx.config.presets import PLAIN

__all__ = ["BITS", "CACHED", "ITERATIONS", "METHODS", "configuration", "methods_for"]

#: Name, weight bits, activation bits.
BITS: dict[str, tuple[int, int]] = {"W8A8": (8, 8), "W4A32": (4, 32), "W4A8": (4, 8), "W4A4": (4, 4)}

#: The time path of the bundled model: what TFMQ-DM's *Freeze* row initialises by min-max.
FROZEN = ("time_embedding.*", "*.time_emb_proj")

#: By the sum over all features, as in the paper; the default weighs them by the prediction (``time_block.py``).
TIAR = {"temporal": "tiar", "temporal_objective": "features"}

#: All rows but the defaults have what published methods have (``PLAIN``), so that they differ in what they name.
#: Fields of the configuration, and of its reconstruction (None: rounded to nearest). One range for all timesteps is the
#: min-max of them all ("shared"), but for "observed time ranges", which smooths it over the calibration data, as the
#: baselines of TFMQ-DM do. "Freeze" is that paper's control: the time path is rounded to nearest and left so, the rest
#: is reconstructed; once with the searched weight ranges of the other rows, once with the min-max ones of the paper.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({}, None),
    "default + BRECQ + TIAR": ({}, {"temporal": "tiar"}),
    "nearest, min-max": (
        {
            "temporal": "shared",
            "weight_range": "minmax",
            "symmetric_weights": True,
            "split_concatenations": False,
            "activation_range": "minmax",
        },
        None,
    ),
    "nearest": ({"temporal": "shared", "weight_range": "mse"}, None),
    "nearest + FSC": ({"temporal": "fsc", "weight_range": "mse"}, None),
    "BRECQ": ({"temporal": "shared", "weight_range": "mse"}, {"temporal": "blocks"}),
    "BRECQ, observed time ranges": ({"temporal": "observed", "weight_range": "mse"}, {"temporal": "blocks"}),
    "BRECQ + Freeze": ({"temporal": "shared", "weight_range": "mse"}, {"temporal": "nearest"}),
    "BRECQ + Freeze, min-max": (
        {
            "temporal": "shared",
            "weight_range": "mse",
            "overrides": {entry: {"weight_range": "minmax"} for entry in FROZEN},
        },
        {"temporal": "nearest"},
    ),
    "BRECQ + FSC": ({"temporal": "fsc", "weight_range": "mse"}, {"temporal": "blocks"}),
    "BRECQ + TIAR": ({"temporal": "shared", "weight_range": "mse"}, TIAR),
    "BRECQ + TIAR + FSC": ({"temporal": "fsc", "weight_range": "mse"}, TIAR),
    "BRECQ, time float": ({"temporal": "float", "weight_range": "mse"}, {"temporal": "nearest"}),
}

#: Measured together with the program it shares: the float features read from 8-bit rows.
CACHED = {"BRECQ, time float": "BRECQ, time cached"}

#: Training steps of each block, by weight bits: rounding at 8 bits has little left to learn.
ITERATIONS = {8: 300, 4: 900}


def methods_for(bits: str) -> list[str]:
    """The methods that differ at these bits: without quantized activations there is nothing to FSC or to observe."""
    without_activations = BITS[bits][1] == 32
    return [name for name in METHODS if not (without_activations and ("FSC" in name or "observed" in name))]


def configuration(
    method: str, bits: str, seed: int, iterations: int | None, temporal_iterations: int
) -> QuantizationConfig:
    """The configuration of one cell."""
    fields, reconstruction = METHODS[method]
    weight_bits, activation_bits = BITS[bits]
    if method == "default":
        return QuantizationConfig(weight_bits=weight_bits, activation_bits=activation_bits)
    settings = {
        "iterations": iterations or ITERATIONS[weight_bits],
        "temporal_iterations": temporal_iterations,
        "batch_size": 8,
        # Noise of bfloat16 (0.2 %) is far below what 4 bits lose, and near what 8 bits lose.
        "precision": "bfloat16" if weight_bits == 4 else "float32",
        "seed": seed,
    }
    return QuantizationConfig(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        reconstruction="nearest" if reconstruction is None else ReconstructionConfig(**{**settings, **reconstruction}),
        **(fields if method.startswith("default") else {**PLAIN, **fields}),
    )
