"""The choices that a configuration has, each written once: checks, type hints and command-line options derive from it.

This file imports no torch, so that the command line can show its help without. Activation observers are an open set,
with a registry of their own: :mod:`tfmq_fx.observers.registry`.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "FeatureObjective",
    "Granularity",
    "LearnedSteps",
    "Lookup",
    "Precision",
    "RoundingMethod",
    "TableStorage",
    "Temporal",
    "TemporalObjective",
    "UnknownTimestep",
    "WeightRange",
]

#: How the activations of the temporal block are quantized.
Temporal = Literal["fsc", "cache", "auto", "shared", "observed", "float"]
#: How a table of temporal features is stored.
TableStorage = Literal["float32", "float16", "int8"]
#: How the range of a weight channel is chosen.
WeightRange = Literal["minmax", "mse"]
#: What a timestep outside the table does.
UnknownTimestep = Literal["extend", "error", "nearest"]
#: What a lookup inside a graph does with a timestep outside the table: nothing is computed there.
Lookup = Literal["error", "nearest"]

#: How weights are rounded.
RoundingMethod = Literal["adaround", "gptq", "adapters", "distillation", "nearest"]
#: What is reconstructed as one unit.
Granularity = Literal["block", "layer", "none"]
#: What the temporal block is reconstructed against.
TemporalObjective = Literal["tiar", "blocks", "nearest"]
#: What the errors of the temporal features are weighed by; None: by the prediction, where that can be.
FeatureObjective = Literal["features", "prediction", None]
#: Whether step sizes of activations are trained: with the rounding of a unit's weights, or behind it.
LearnedSteps = Literal[False, True, "after"]
#: What a unit is trained in.
Precision = Literal["float32", "bfloat16"]
