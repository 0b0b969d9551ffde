"""The configuration that the options of ``quantize`` ask for, and which of them have no effect."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from tfmq_fx.cli.given_options import is_given

if TYPE_CHECKING:
    from tfmq_fx.config.presets import Preset
    from tfmq_fx.config.quantization import QuantizationConfig

__all__ = ["configuration_of_options", "missing_for_options"]


def missing_for_options(config: QuantizationConfig, sampler: str) -> dict[str, str | None]:
    """For each option that matters only beside others: what it needs and does not have here."""
    from tfmq_fx.config.quantization import FLOAT_BITS

    chosen = config.resolved_reconstruction
    learned = chosen if chosen is not None and chosen.method == "adaround" else None
    has_blocks = learned is not None and learned.granularity != "none"
    has_temporal_unit = learned is not None and learned.temporal == "tiar"
    observes = config.activation_bits != FLOAT_BITS or config.output_bits is not None
    return {
        "iterations": None if has_blocks else "a reconstruction that trains blocks, such as --reconstruction tfmq-dm",
        "temporal_iterations": None
        if has_temporal_unit
        else "a reconstruction that trains the temporal block, such as --reconstruction tfmq-dm",
        "cache_gib": None if chosen is not None else "a reconstruction, such as --reconstruction tfmq-dm",
        "ndtc_mean": None if sampler == "ndtc" else "--sampler ndtc",
        "activation_range": None if observes else f"quantized activations, --activation-bits below {FLOAT_BITS}",
    }


def configuration_of_options(
    context: typer.Context, method: Preset | None, written: QuantizationConfig | None, seed: int, **options: Any
) -> QuantizationConfig:
    """The configuration of these options, on top of a preset's or a file's."""
    from tfmq_fx.config.quantization import QuantizationConfig

    if method is not None or written is not None:
        options = {name: value for name, value in options.items() if is_given(context, name)}
    iteration_counts = {name: options.pop(name) for name in ("iterations", "temporal_iterations") if name in options}
    if written is not None:
        config = dataclasses.replace(written, **options)
    else:
        config = QuantizationConfig(**(options if method is None else method.with_values(options)))
    reconstruction = config.resolved_reconstruction
    if reconstruction is None:
        return config
    return dataclasses.replace(
        config, reconstruction=dataclasses.replace(reconstruction, **iteration_counts, seed=seed)
    )
