"""Analyses: they read a graph and change nothing."""

from .dependence import data_arguments, data_dependence
from .temporal_block import EmbeddingLayer, TemporalBlock, find_temporal_block
from .temporal_evaluation import NodeHook, evaluate_temporal_nodes

__all__ = [
    "EmbeddingLayer",
    "NodeHook",
    "TemporalBlock",
    "data_arguments",
    "data_dependence",
    "evaluate_temporal_nodes",
    "find_temporal_block",
]
