"""Graph rewrites: one pass a file, each an instance of torch's ``PassBase``.

Every pass is called on a ``GraphModule`` and returns a ``PassResult``; several run in order in a
``torch.fx.passes.infra.pass_manager.PassManager`` or through :func:`run_pipeline`. The passes of
:data:`CANONICALIZE` and :data:`REWRITE_FOR_QUANTIZATION` preserve numerics.
"""

from .base import GraphPass, PassError
from .decompose_attention import DecomposeAttention
from .flatten_linear_inputs import FlattenLinearInputs
from .fold_weight_zero_points import FoldWeightZeroPoints
from .index_timesteps import IndexTimesteps
from .inline_timestep_rows import InlineTimestepRows
from .normalize_arguments import NormalizeArguments
from .observe_temporal_block import ObserveTemporalBlock
from .pipelines import CANONICALIZE, run_pipeline
from .propagate_values import PropagateValues
from .remove_dropouts import RemoveDropouts
from .remove_guards import RemoveGuards
from .remove_identity_arithmetic import RemoveIdentityArithmetic
from .remove_noop_casts import RemoveNoopCasts
from .split_concatenated_convs import SplitConcatenatedConvs
from .strip_dead_state import StripDeadState
from .tabulate_temporal_block import TabulateTemporalBlock

__all__ = [
    "CANONICALIZE",
    "DecomposeAttention",
    "FlattenLinearInputs",
    "FoldWeightZeroPoints",
    "GraphPass",
    "IndexTimesteps",
    "InlineTimestepRows",
    "NormalizeArguments",
    "ObserveTemporalBlock",
    "PassError",
    "PropagateValues",
    "RemoveDropouts",
    "RemoveGuards",
    "RemoveIdentityArithmetic",
    "RemoveNoopCasts",
    "SplitConcatenatedConvs",
    "StripDeadState",
    "TabulateTemporalBlock",
    "run_pipeline",
]
