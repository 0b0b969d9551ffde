"""Diagnostics: what a quantized diffusion model lost, and where.

:func:`diagnose` measures everything at once; the functions behind it work on any captured graph, program or
denoiser. Definitions are those of TFMQ-DM (CVPR 2024, section 4) where it has them. Pictures are matplotlib
figures, which is imported when the first one is drawn.
"""

from tfmq_fx.diagnostics.diagnosis import Diagnosis
from tfmq_fx.diagnostics.features import (
    TemporalFeatureError,
    TemporalFeatures,
    temporal_feature_error,
    temporal_features,
)
from tfmq_fx.diagnostics.graph_runs import graph_denoiser, with_temporal_features
from tfmq_fx.diagnostics.layer_error import LayerError, LayerErrors, layer_errors
from tfmq_fx.diagnostics.mismatch import TemporalMismatch, find_mismatch, match_timesteps, temporal_mismatch
from tfmq_fx.diagnostics.plots import deviation_curve, feature_error_plot, layer_error_plot, mismatch_heatmap
from tfmq_fx.diagnostics.report import diagnose
from tfmq_fx.diagnostics.same_model import check_same_model
from tfmq_fx.diagnostics.tables import comparison_table
from tfmq_fx.diagnostics.trajectory import (
    Trajectory,
    TrajectoryDeviation,
    compare_trajectories,
    record_trajectory,
    trajectory_deviation,
)

__all__ = [
    "Diagnosis",
    "LayerError",
    "LayerErrors",
    "TemporalFeatureError",
    "TemporalFeatures",
    "TemporalMismatch",
    "Trajectory",
    "TrajectoryDeviation",
    "check_same_model",
    "compare_trajectories",
    "comparison_table",
    "deviation_curve",
    "diagnose",
    "feature_error_plot",
    "find_mismatch",
    "graph_denoiser",
    "layer_error_plot",
    "layer_errors",
    "match_timesteps",
    "mismatch_heatmap",
    "record_trajectory",
    "temporal_feature_error",
    "temporal_features",
    "temporal_mismatch",
    "trajectory_deviation",
    "with_temporal_features",
]
