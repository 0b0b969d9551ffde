"""Graph rewrites: one pass a file, each an instance of torch's ``PassBase``.

Every pass is called on a ``GraphModule`` and returns a ``PassResult``; several run in order in a
``torch.fx.passes.infra.pass_manager.PassManager`` or through :func:`run_pipeline`. The passes of
:data:`CANONICALIZE` and :data:`REWRITE_FOR_QUANTIZATION` preserve numerics.
"""

from .base import GraphPass, PassError
from .compress_temporal_table import CompressTemporalTable
from .compute_in_float32 import ComputeInFloat32
from .decompose_attention import DecomposeAttention
from .dequantize_weights import DequantizeWeights
from .flatten_frame_convs import FlattenFrameConvs
from .flatten_linear_inputs import FlattenLinearInputs
from .fold_weight_zero_points import FoldWeightZeroPoints
from .fuse_group_norms import FuseGroupNorms
from .fuse_quantized_images import FuseQuantizedImages
from .fuse_residual_adds import FuseResidualAdds
from .group_timesteps import GroupTimesteps
from .hoist_quantizers import HoistQuantizers
from .index_timesteps import IndexTimesteps
from .inline_regions import InlineRegions
from .inline_timestep_rows import InlineTimestepRows
from .join_units import JoinUnits
from .lower_indexed_convs import LowerIndexedConvs
from .lower_integer_attention import LowerIntegerAttention
from .lower_integer_convs import LowerIntegerConvs
from .merge_equal_nodes import MergeEqualNodes
from .narrow_activations import NarrowActivations
from .normalize_arguments import NormalizeArguments
from .observe_temporal_block import ObserveTemporalBlock
from .observe_timestep_groups import ObserveTimestepGroups
from .partition_units import PartitionUnits
from .pipelines import CANONICALIZE, NATIVE_KERNELS, run_pipeline
from .propagate_values import PropagateValues
from .remove_dropouts import RemoveDropouts
from .remove_guards import RemoveGuards
from .remove_identity_arithmetic import RemoveIdentityArithmetic
from .remove_noop_casts import RemoveNoopCasts
from .replace_in_place import ReplaceInPlace
from .resolve_paddings import ResolvePaddings
from .set_unknown_timesteps import SetUnknownTimesteps
from .share_temporal_nodes import ShareTemporalNodes
from .sink_repeated_rows import SinkRepeatedRows
from .split_concatenated_convs import SplitConcatenatedConvs
from .strip_dead_state import StripDeadState
from .subgraphs import extract_subgraph
from .tabulate_temporal_block import TabulateTemporalBlock
from .use_one_timestep_group import UseOneTimestepGroup
from .widen_sequence_convs import WidenSequenceConvs
from .widen_timesteps import WidenTimesteps

__all__ = [
    "CANONICALIZE",
    "NATIVE_KERNELS",
    "CompressTemporalTable",
    "ComputeInFloat32",
    "DecomposeAttention",
    "DequantizeWeights",
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
    "MergeEqualNodes",
    "NarrowActivations",
    "NormalizeArguments",
    "ObserveTemporalBlock",
    "ObserveTimestepGroups",
    "PartitionUnits",
    "PassError",
    "PropagateValues",
    "RemoveDropouts",
    "RemoveGuards",
    "RemoveIdentityArithmetic",
    "RemoveNoopCasts",
    "ReplaceInPlace",
    "ResolvePaddings",
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
    "run_pipeline",
]
