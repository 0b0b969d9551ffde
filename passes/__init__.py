"""Graph rewrites: one pass a file, each an instance of torch's ``PassBase``.

Every pass is called on a ``GraphModule`` and returns a ``PassResult``; several run in order as a :class:`Pipeline`,
or in a ``torch.fx.passes.infra.pass_manager.PassManager``. What a pass promises about numerics is its
:attr:`~GraphPass.numerics`; passes that change them lie in the room ``precision``, and nowhere else.
:func:`observe_passes` looks on, or leaves passes out, wherever they are called.
"""

from tfmq_fx.passes.base import GraphPass, Numerics, PassError
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
from tfmq_fx.passes.layout.add_low_rank_branches import AddLowRankBranches
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
from tfmq_fx.passes.native.lower_indexed_convs import LowerIndexedConvs
from tfmq_fx.passes.native.lower_integer_attention import LowerIntegerAttention
from tfmq_fx.passes.native.lower_integer_convs import LowerIntegerConvs
from tfmq_fx.passes.native.lower_pointwise_convs import LowerPointwiseConvs
from tfmq_fx.passes.observation import PassApplication, observe_passes
from tfmq_fx.passes.pipeline import Pipeline, run_pipeline
from tfmq_fx.passes.pipelines import (
    CANONICALIZE,
    FINISH_CONVERSION,
    NARROW_ACTIVATIONS,
    NATIVE_KERNELS,
    PIPELINES,
    REWRITE_FOR_ANNOTATION,
    find_pipeline,
)
from tfmq_fx.passes.precision.compress_temporal_table import CompressTemporalTable
from tfmq_fx.passes.precision.compute_in_float32 import ComputeInFloat32
from tfmq_fx.passes.precision.narrow_activations import NarrowActivations
from tfmq_fx.passes.quantized.dequantize_weights import DequantizeWeights
from tfmq_fx.passes.quantized.factor_item_scales import FactorItemScales
from tfmq_fx.passes.quantized.fold_weight_zero_points import FoldWeightZeroPoints
from tfmq_fx.passes.quantized.hoist_quantizers import HoistQuantizers
from tfmq_fx.passes.quantized.scale_channels import ScaleChannels
from tfmq_fx.passes.registry import find_pass, pass_registry
from tfmq_fx.passes.support.subgraphs import extract_subgraph
from tfmq_fx.passes.temporal.group_timesteps import GroupTimesteps
from tfmq_fx.passes.temporal.index_timesteps import IndexTimesteps
from tfmq_fx.passes.temporal.inline_timestep_rows import InlineTimestepRows
from tfmq_fx.passes.temporal.observe_temporal_block import ObserveTemporalBlock
from tfmq_fx.passes.temporal.observe_timestep_groups import ObserveTimestepGroups
from tfmq_fx.passes.temporal.set_unknown_timesteps import SetUnknownTimesteps
from tfmq_fx.passes.temporal.share_temporal_nodes import ShareTemporalNodes
from tfmq_fx.passes.temporal.tabulate_temporal_block import TabulateTemporalBlock
from tfmq_fx.passes.temporal.use_one_timestep_group import UseOneTimestepGroup
from tfmq_fx.passes.temporal.widen_timesteps import WidenTimesteps
from tfmq_fx.passes.units.join_units import JoinUnits
from tfmq_fx.passes.units.partition_units import PartitionUnits

__all__ = [
    "CANONICALIZE",
    "FINISH_CONVERSION",
    "NARROW_ACTIVATIONS",
    "NATIVE_KERNELS",
    "PIPELINES",
    "REWRITE_FOR_ANNOTATION",
    "AddLowRankBranches",
    "CompressTemporalTable",
    "ComputeInFloat32",
    "DecomposeAttention",
    "DeferSoftmaxNormalization",
    "DequantizeWeights",
    "FactorItemScales",
    "FillUninitialized",
    "FlattenFrameConvs",
    "FlattenLinearInputs",
    "FoldWeightZeroPoints",
    "FuseGroupNorms",
    "FuseQuantizedImages",
    "FuseResidualAdds",
    "GraphPass",
    "GroupTimesteps",
    "HoistQuantizers",
    "IndexTimesteps",
    "InlineRegions",
    "InlineTimestepRows",
    "JoinUnits",
    "LowerIndexedConvs",
    "LowerIntegerAttention",
    "LowerIntegerConvs",
    "LowerPointwiseConvs",
    "MergeEqualNodes",
    "NarrowActivations",
    "NormalizeArguments",
    "Numerics",
    "ObserveTemporalBlock",
    "ObserveTimestepGroups",
    "PartitionUnits",
    "PassApplication",
    "PassError",
    "Pipeline",
    "PropagateValues",
    "RemoveDropouts",
    "RemoveGuards",
    "RemoveIdentityArithmetic",
    "RemoveNoopCasts",
    "ReplaceInPlace",
    "ResolvePaddings",
    "ScaleChannels",
    "SetUnknownTimesteps",
    "ShareTemporalNodes",
    "SinkRepeatedRows",
    "SplitConcatenatedConvs",
    "StripDeadState",
    "TabulateTemporalBlock",
    "UseOneTimestepGroup",
    "WidenSequenceConvs",
    "WidenTimesteps",
    "extract_subgraph",
    "find_pass",
    "find_pipeline",
    "observe_passes",
    "pass_registry",
    "run_pipeline",
]
