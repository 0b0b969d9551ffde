"""The pipelines of this package, with the reasons for their order."""

from __future__ import annotations

from collections.abc import Mapping

from tfmq_fx.errors import ConfigError
from tfmq_fx.passes.base import Numerics
from tfmq_fx.passes.canonical.fill_uninitialized import FillUninitialized
from tfmq_fx.passes.canonical.inline_regions import InlineRegions
from tfmq_fx.passes.canonical.merge_equal_nodes import MergeEqualNodes
from tfmq_fx.passes.canonical.normalize_arguments import NormalizeArguments
from tfmq_fx.passes.canonical.propagate_values import PropagateValues
from tfmq_fx.passes.canonical.remove_dropouts import RemoveDropouts
from tfmq_fx.passes.canonical.remove_guards import RemoveGuards
from tfmq_fx.passes.canonical.remove_identity_arithmetic import RemoveIdentityArithmetic
from tfmq_fx.passes.canonical.remove_noop_casts import RemoveNoopCasts
from tfmq_fx.passes.canonical.replace_in_place import ReplaceInPlace
from tfmq_fx.passes.canonical.resolve_paddings import ResolvePaddings
from tfmq_fx.passes.canonical.strip_dead_state import StripDeadState
from tfmq_fx.passes.layout.decompose_attention import DecomposeAttention
from tfmq_fx.passes.layout.defer_softmax_normalization import DeferSoftmaxNormalization
from tfmq_fx.passes.layout.flatten_frame_convs import FlattenFrameConvs
from tfmq_fx.passes.layout.flatten_linear_inputs import FlattenLinearInputs
from tfmq_fx.passes.layout.sink_repeated_rows import SinkRepeatedRows
from tfmq_fx.passes.layout.split_concatenated_convs import SplitConcatenatedConvs
from tfmq_fx.passes.layout.widen_sequence_convs import WidenSequenceConvs
from tfmq_fx.passes.native.fuse_group_norms import FuseGroupNorms
from tfmq_fx.passes.native.fuse_quantized_images import FuseQuantizedImages
from tfmq_fx.passes.native.fuse_residual_adds import FuseResidualAdds
from tfmq_fx.passes.native.lower_integer_attention import LowerIntegerAttention
from tfmq_fx.passes.native.lower_integer_convs import LowerIntegerConvs
from tfmq_fx.passes.native.lower_pointwise_convs import LowerPointwiseConvs
from tfmq_fx.passes.pipeline import Pipeline
from tfmq_fx.passes.precision.narrow_activations import NarrowActivations
from tfmq_fx.passes.quantized.fold_weight_zero_points import FoldWeightZeroPoints
from tfmq_fx.passes.temporal.share_temporal_nodes import ShareTemporalNodes

__all__ = [
    "CANONICALIZE",
    "FINISH_CONVERSION",
    "NARROW_ACTIVATIONS",
    "NATIVE_KERNELS",
    "PIPELINES",
    "REWRITE_FOR_ANNOTATION",
    "find_pipeline",
]

CANONICALIZE = Pipeline(
    "canonicalize",
    Numerics.EXACT,
    "Bring an exported graph into the form that all later passes expect. Regions go first: no other pass looks into "
    "them. Then guards, which read nodes that the later passes want to see unread, and writes in place: behind them a "
    "value is what its node computes, and memory that comes uninitialized can come with zeros. Dead state goes last, "
    "when nothing reads it any more.",
    (
        InlineRegions,
        RemoveGuards,
        ReplaceInPlace,
        FillUninitialized,
        NormalizeArguments,
        ResolvePaddings,
        RemoveDropouts,
        RemoveIdentityArithmetic,
        RemoveNoopCasts,
        StripDeadState,
    ),
)

REWRITE_FOR_ANNOTATION = Pipeline(
    "rewrite-for-annotation",
    Numerics.CLOSE,
    "Bring layers into the form that is annotated. Attention goes first: its products become operators that the others "
    "see, and the division by the sum of its softmax goes behind them. Layers are made two-dimensional before "
    "repetitions sink below them, and equal nodes of the time path are shared last, when each stands where it stays.",
    (
        DecomposeAttention,
        DeferSoftmaxNormalization,
        SplitConcatenatedConvs,
        FlattenFrameConvs,
        WidenSequenceConvs,
        FlattenLinearInputs,
        SinkRepeatedRows,
        ShareTemporalNodes,
    ),
    after=CANONICALIZE,
)

FINISH_CONVERSION = Pipeline(
    "finish-conversion",
    Numerics.EXACT,
    "Finish a graph that was converted to quantize/dequantize pairs. Values first: the passes behind need them. Dead "
    "state last: the float weights die in between.",
    (PropagateValues, FoldWeightZeroPoints, StripDeadState),
)

NATIVE_KERNELS = Pipeline(
    "native-kernels",
    Numerics.CLOSE,
    "Put a quantized graph on our own kernels. Equal nodes are merged before and behind the layers: layers that read "
    "one activation then share its quantization, and the shapes that they ask it in. Norms and images are fused into "
    "what the layers left: a quantizer whose readers take it channels last. Sums go last, when both sides are where "
    "they stay.",
    (
        MergeEqualNodes,
        LowerIntegerConvs,
        LowerPointwiseConvs,
        LowerIntegerAttention,
        MergeEqualNodes,
        FuseGroupNorms,
        FuseQuantizedImages,
        FuseResidualAdds,
        StripDeadState,
    ),
    after=FINISH_CONVERSION,
)

NARROW_ACTIVATIONS = Pipeline(
    "narrow-activations",
    Numerics.CHANGED,
    "Let bfloat16 pass between our own kernels.",
    (NarrowActivations,),
    after=NATIVE_KERNELS,
)

#: Every pipeline of this package by name.
PIPELINES: Mapping[str, Pipeline] = {
    pipeline.name: pipeline
    for pipeline in (CANONICALIZE, REWRITE_FOR_ANNOTATION, FINISH_CONVERSION, NATIVE_KERNELS, NARROW_ACTIVATIONS)
}


def find_pipeline(name: str) -> Pipeline:
    """The pipeline of that name.

    Raises:
        ConfigError: There is none.
    """
    if not isinstance(name, str) or name not in PIPELINES:
        msg = f"there is no pipeline {name!r}; known are {', '.join(PIPELINES)}"
        raise ConfigError(msg)
    return PIPELINES[name]
