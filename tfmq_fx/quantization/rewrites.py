"""The exact rewrites that bring a graph into the form to annotate."""

from __future__ import annotations

from torch import fx

from tfmq_fx.frontend.canonical import canonicalize
from tfmq_fx.passes import (
    REWRITE_FOR_ANNOTATION,
    DecomposeAttention,
    DeferSoftmaxNormalization,
    Pipeline,
    ShareTemporalNodes,
    SinkRepeatedRows,
    SplitConcatenatedConvs,
)
from tfmq_fx.quantization.quantizer_options import QuantizerOptions
from tfmq_fx.temporal.values import accept_timesteps

__all__ = ["layout_rewrites", "rewrite_for_annotation"]


def layout_rewrites(options: QuantizerOptions) -> Pipeline:
    """The part of :data:`~tfmq_fx.passes.REWRITE_FOR_ANNOTATION` that needs nothing read off the rewritten graph.

    Args:
        options: Of the quantizer: attention in float stays one operator, and concatenations are split on demand.
    """
    config = options.config
    excluded = [ShareTemporalNodes.id]
    if not config.quantizes_attention:
        excluded.append(DecomposeAttention.id)
    if not (config.quantizes_attention and config.defer_softmax):
        excluded.append(DeferSoftmaxNormalization.id)
    if not config.split_concatenations:
        excluded.append(SplitConcatenatedConvs.id)
    return REWRITE_FOR_ANNOTATION.without(*excluded).with_options(SinkRepeatedRows, timestep=options.timestep)


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
    layout_rewrites(options).run(model)
    time_inputs = (*options.finite, *options.conditions(model))
    ShareTemporalNodes(timestep=options.timestep, finite=time_inputs)(model)
