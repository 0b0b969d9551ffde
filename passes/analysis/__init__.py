"""Analyses: they read a graph and change nothing."""

from .dependence import data_arguments, data_dependence
from .layer_names import layer_name, weight_source
from .reconstruction_units import ReconstructionUnit, find_units
from .temporal_block import EmbeddingLayer, TemporalBlock, find_temporal_block
from .temporal_evaluation import NodeHook, evaluate_temporal_nodes

__all__ = [
    "EmbeddingLayer",
    "NodeHook",
    "ReconstructionUnit",
    "TemporalBlock",
    "data_arguments",
    "data_dependence",
    "evaluate_temporal_nodes",
    "find_temporal_block",
    "find_units",
    "layer_name",
    "weight_source",
]
