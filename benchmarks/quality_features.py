"""Temporal features in the quality benchmark: their errors, and as 8-bit rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfmq_fx.diagnostics import find_mismatch, temporal_feature_error
from tfmq_fx.temporal.table import stored_rows

__all__ = ["cached_rows", "compare_features", "mismatch_entry"]


def cached_rows(features: Any) -> Any:
    """Temporal features as ``temporal="cache"`` stores them: 8-bit rows with a scale and zero point of their own."""
    return dataclasses.replace(features, values=tuple(stored_rows(table, "int8") for table in features.values))


def mismatch_entry(mismatch: Any) -> dict[str, float]:
    """What of a mismatch is kept."""
    return {"right": mismatch.share_right, "mean": mismatch.mean_shift}


def compare_features(original: Any, features: Any) -> dict[str, Any]:
    """Errors and mismatch of temporal features over the schedule: the relative error, and the paper's cosine."""
    error = temporal_feature_error(original, features)
    return {
        "feature_error": error.overall,
        "feature_cosine": {"mean": error.mean_cosine, "least": error.least_cosine},
        "mismatch": mismatch_entry(find_mismatch(original, features, "cosine")),
        "mismatch_by_distance": mismatch_entry(find_mismatch(original, features, "distance")),
    }
