"""Ordered lists of passes, and why they stand in that order."""

from __future__ import annotations

from collections.abc import Sequence

from tfmq_fx.passes.base import GraphPass
from tfmq_fx.passes.canonical.inline_regions import InlineRegions
from tfmq_fx.passes.canonical.merge_equal_nodes import MergeEqualNodes
from tfmq_fx.passes.canonical.normalize_arguments import NormalizeArguments
from tfmq_fx.passes.canonical.remove_dropouts import RemoveDropouts
from tfmq_fx.passes.canonical.remove_guards import RemoveGuards
from tfmq_fx.passes.canonical.remove_identity_arithmetic import RemoveIdentityArithmetic
from tfmq_fx.passes.canonical.remove_noop_casts import RemoveNoopCasts
from tfmq_fx.passes.canonical.replace_in_place import ReplaceInPlace
from tfmq_fx.passes.canonical.resolve_paddings import ResolvePaddings
from tfmq_fx.passes.canonical.strip_dead_state import StripDeadState
from tfmq_fx.passes.native.fuse_group_norms import FuseGroupNorms
from tfmq_fx.passes.native.fuse_quantized_images import FuseQuantizedImages
from tfmq_fx.passes.native.fuse_residual_adds import FuseResidualAdds
from tfmq_fx.passes.native.lower_integer_attention import LowerIntegerAttention
from tfmq_fx.passes.native.lower_integer_convs import LowerIntegerConvs
from torch import fx

__all__ = ["CANONICALIZE", "NATIVE_KERNELS", "run_pipeline"]

#: Bring an exported graph into the form that all later passes expect. Regions go first: no other pass looks into
#: them. Then guards, which read nodes that the later passes want to see unread, and writes in place: behind them a
#: value is what its node computes. Dead state goes last, when nothing reads it any more.
CANONICALIZE: tuple[type[GraphPass], ...] = (
    InlineRegions,
    RemoveGuards,
    ReplaceInPlace,
    NormalizeArguments,
    ResolvePaddings,
    RemoveDropouts,
    RemoveIdentityArithmetic,
    RemoveNoopCasts,
    StripDeadState,
)

#: Put a quantized graph on our own kernels. Equal nodes are merged before and behind the layers: layers that read one
#: activation then share its quantization, and the shapes that they ask it in. Norms and images are fused into what the
#: layers left: a quantizer whose readers take it channels last. Sums go last, when both sides are where they stay.
#: Numerics are preserved up to the order of float sums; ``NarrowActivations``, which may follow, changes them.
NATIVE_KERNELS: tuple[type[GraphPass], ...] = (
    MergeEqualNodes,
    LowerIntegerConvs,
    LowerIntegerAttention,
    MergeEqualNodes,
    FuseGroupNorms,
    FuseQuantizedImages,
    FuseResidualAdds,
    StripDeadState,
)


def run_pipeline(graph_module: fx.GraphModule, pipeline: Sequence[type[GraphPass]]) -> bool:
    """Run each pass once, in order, with its default options; return whether any changed the graph."""
    modified = False
    for make in pipeline:
        result = make()(graph_module)
        modified |= result is not None and result.modified
    return modified
