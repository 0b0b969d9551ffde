"""Analyses: they read a graph and change nothing."""

from tfmq_fx.passes.analysis.conditional_part import (
    ConditionalPart,
    conditioning_inputs,
    find_conditional_part,
    outside_block,
)
from tfmq_fx.passes.analysis.dependence import data_arguments, data_dependence
from tfmq_fx.passes.analysis.layer_names import layer_name, weight_source
from tfmq_fx.passes.analysis.reconstruction_units import ReconstructionUnit, find_units
from tfmq_fx.passes.analysis.shortcuts import find_shortcuts
from tfmq_fx.passes.analysis.table_row import (
    find_row,
    row_columns,
    row_inputs,
    row_lookups,
    row_values,
    several_timesteps,
)
from tfmq_fx.passes.analysis.temporal_block import EmbeddingLayer, TemporalBlock, find_temporal_block
from tfmq_fx.passes.analysis.temporal_evaluation import NodeHook, evaluate_temporal_nodes

__all__ = [
    "ConditionalPart",
    "EmbeddingLayer",
    "NodeHook",
    "ReconstructionUnit",
    "TemporalBlock",
    "conditioning_inputs",
    "data_arguments",
    "data_dependence",
    "evaluate_temporal_nodes",
    "find_conditional_part",
    "find_row",
    "find_shortcuts",
    "find_temporal_block",
    "find_units",
    "layer_name",
    "outside_block",
    "row_columns",
    "row_inputs",
    "row_lookups",
    "row_values",
    "several_timesteps",
    "weight_source",
]
