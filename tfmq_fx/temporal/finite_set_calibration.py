"""Finite set calibration (FSC): exact ranges for the temporal block, without any image.

Source: TFMQ-DM (CVPR 2024), section 5. The temporal block is run over every timestep of the table with
its weights, and the activations before each site, already quantized, so the ranges are those that the
quantized block will really see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx.observers import PerChannelWeightObserver, TimestepObserver
from tfmq_fx.passes.analysis import NodeHook, evaluate_temporal_nodes, find_temporal_block, row_columns
from tfmq_fx.temporal.refusal import refused_rows

__all__ = ["calibrate_temporal_block", "quantized_values", "timestep_sites"]


@torch.no_grad()
def calibrate_temporal_block(prepared: fx.GraphModule, timestep: str = "timestep") -> int:
    """Set the parameters of every timestep-indexed observer from scratch.

    Args:
        prepared: A graph with timestep-indexed observers; it is updated in place.
        timestep: Name of the timestep placeholder.

    Returns:
        The number of observers that were calibrated; 0 when the graph has none.

    Raises:
        NonFiniteError: A layer sees NaN or infinite values at a timestep; the error names both.
    """
    columns = row_columns(prepared)
    block = find_temporal_block(prepared, timestep)
    sites = timestep_sites(prepared, block.nodes)
    if not columns or not sites:
        return 0
    observers = {prepared.get_submodule(str(site.target)) for site in sites}
    for observer in observers:
        assert isinstance(observer, TimestepObserver)
        observer.reset()
    with refused_rows(columns[timestep], columns[timestep]):
        evaluate_temporal_nodes(prepared, block.nodes, block.linears, columns, hook=quantized_values(prepared))
    return len(observers)


def timestep_sites(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The calls among ``nodes`` of observers, or fake quantizers, with parameters per timestep."""
    calls = [node for node in nodes if node.op == "call_module"]
    return [node for node in calls if isinstance(graph_module.get_submodule(str(node.target)), TimestepObserver)]


def quantized_values(prepared: fx.GraphModule) -> NodeHook:
    """Makes an evaluation see what the quantized model will: weights, and activations with parameters per timestep."""

    def quantized(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if node.op != "call_module":
            return value
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, TimestepObserver):
            x, rows = args
            return module.fake_quantize(x, rows)
        if isinstance(module, PerChannelWeightObserver):
            assert isinstance(value, Tensor)
            return module.dequantized().to(value.dtype)
        return value

    return quantized
