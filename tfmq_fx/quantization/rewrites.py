"""The exact rewrites that bring a graph into the form to annotate."""

from __future__ import annotations

from torch import fx

from tfmq_fx.config.quantization import FLOAT_BITS
from tfmq_fx.frontend.canonical import canonicalize
from tfmq_fx.passes import (
    DecomposeAttention,
    FlattenFrameConvs,
    FlattenLinearInputs,
    ShareTemporalNodes,
    SinkRepeatedRows,
    SplitConcatenatedConvs,
    WidenSequenceConvs,
)
from tfmq_fx.passes.base import GraphPass
from tfmq_fx.quantization.quantizer_options import QuantizerOptions
from tfmq_fx.temporal.values import accept_timesteps

__all__ = ["layout_rewrites", "rewrite_for_annotation"]


def layout_rewrites(options: QuantizerOptions) -> tuple[GraphPass, ...]:
    """The rewrites that expose every layer to quantization, in order.

    Attention comes first, because its products become layers, and concatenations before convolutions change their form.
    Repeated rows sink last: what is computed per item before is then behind no layer that the others still move.
    """
    config = options.config
    attention = config.activation_bits < FLOAT_BITS and "attention" not in config.keep_float
    return (
        *([DecomposeAttention()] if attention else []),
        *([SplitConcatenatedConvs()] if config.split_concatenations else []),
        FlattenFrameConvs(),
        WidenSequenceConvs(),
        FlattenLinearInputs(),
        SinkRepeatedRows(timestep=options.timestep),
    )


def rewrite_for_annotation(model: fx.GraphModule, options: QuantizerOptions) -> None:
    """Rewrite an exported graph in place for what :class:`tfmq_fx.TFMQQuantizer` annotates; it computes the same.

    1. :func:`~tfmq_fx.frontend.canonical.canonicalize`, for graphs that :func:`tfmq_fx.capture` did not make.
    2. The timestep input takes the schedule's values.
    3. :func:`layout_rewrites`.
    4. What only the time path computes is computed once. It needs the inputs that the path depends on, which are read
       off the rewritten graph.

    Args:
        model: The graph.
        options: Of the quantizer.

    Raises:
        CaptureError: The graph cannot be brought into canonical form.
        ConfigError: The graph cannot take the timesteps of the schedule.
    """
    canonicalize(model)
    if options.timesteps is not None:
        accept_timesteps(model, options.timesteps, options.timestep)
    for rewrite in layout_rewrites(options):
        rewrite(model)
    time_inputs = (*options.finite, *options.conditions(model))
    ShareTemporalNodes(timestep=options.timestep, finite=time_inputs)(model)
