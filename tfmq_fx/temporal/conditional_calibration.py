"""Ranges for layers that see the timestep and the conditioning, over all timesteps, without any image.

What finite set calibration does for the temporal block (TFMQ-DM, CVPR 2024, section 5) is done here over pairs of
timestep and conditioning: every timestep gets the range of what it sees under the conditionings of calibration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.observers import PerChannelWeightObserver, TimestepObserver
from tfmq_fx.observers.ranges import fake_quantize
from tfmq_fx.passes.analysis import (
    NodeHook,
    TemporalBlock,
    evaluate_temporal_nodes,
    find_temporal_block,
    outside_block,
)
from tfmq_fx.passes.temporal.index_timesteps import distinct_timesteps
from tfmq_fx.temporal.conditionings import ConditionedTimesteps, Conditionings
from tfmq_fx.temporal.finite_set_calibration import quantized_values, timestep_sites
from tfmq_fx.temporal.refusal import refused_rows

__all__ = ["calibrate_conditional_part", "conditioned_path", "observe_pairs", "prepared_conditionings"]

#: Observers that :func:`quantized_values` knows; the others have one set of parameters, from the batches.
DATA_FREE = (TimestepObserver, PerChannelWeightObserver)


def conditioned_path(graph_module: fx.GraphModule, state: PreparedState) -> TemporalBlock:
    """The time path with its conditioning: the temporal block and what else the sample does not reach.

    Args:
        graph_module: A prepared graph.
        state: Its state.
    """
    return find_temporal_block(graph_module, state.timestep, finite=state.path_inputs)


def prepared_conditionings(state: PreparedState) -> Conditionings | None:
    """A collection for what a prepared graph's time path takes beside the timestep; None when there is nothing."""
    if not state.conditions or state.timesteps is None:
        return None
    return Conditionings(state.path_inputs)


@torch.no_grad()
def calibrate_conditional_part(prepared: fx.GraphModule, state: PreparedState, conditionings: Conditionings) -> int:
    """Set the parameters of every observer of the conditional part from scratch.

    Args:
        prepared: A graph whose other observers are calibrated; it is updated in place.
        state: Its state.
        conditionings: Those of the calibration batches.

    Returns:
        The number of observers that were calibrated; 0 when the graph has none.
    """
    path = conditioned_path(prepared, state)
    nodes = outside_block(path, find_temporal_block(prepared, path.timestep))
    sites = timestep_sites(prepared, nodes)
    if not sites:
        return 0
    pairs = conditionings.with_timesteps(distinct_timesteps(state.timesteps), path.timestep)
    modules = [prepared.get_submodule(str(node.target)) for node in path.nodes if node.op == "call_module"]
    with _unchanged(
        module for module in modules if not isinstance(module, (TimestepObserver, PerChannelWeightObserver))
    ):
        observe_pairs(prepared, path, sites, pairs, hook=_all_quantized(prepared))
    return len(sites)


def observe_pairs(
    graph_module: fx.GraphModule,
    path: TemporalBlock,
    sites: Sequence[fx.Node],
    pairs: ConditionedTimesteps,
    *,
    hook: NodeHook = lambda node, args, value: value,
) -> None:
    """Give each site the ranges of what it sees over all pairs, behind those before it, which are settled by then.

    Args:
        graph_module: The graph; its observers, or fake quantizers, are updated in place.
        path: The time path with its conditioning.
        sites: Calls of observers with parameters per timestep, in the order of the graph.
        pairs: Timesteps and conditionings.
        hook: Gives the other nodes the values that the quantized model will see.

    Raises:
        NonFiniteError: A layer sees NaN or infinite values at a timestep; the error names both.
    """
    for site in sites:
        observer = graph_module.get_submodule(str(site.target))
        assert isinstance(observer, TimestepObserver)
        observer.reset()

        def watch(
            node: fx.Node, args: tuple[Any, ...], value: Any, site: fx.Node = site, own: TimestepObserver = observer
        ) -> Any:
            if node is not site:
                return hook(node, args, value)
            own.observe(*args)
            # Only the ranges are wanted; values of many pairs would fill the memory.
            return args[1]

        for columns in pairs.chunks():
            with refused_rows(pairs.timesteps, columns[path.timestep]):
                evaluate_temporal_nodes(graph_module, path.nodes, [site], columns, hook=watch)


def _all_quantized(prepared: fx.GraphModule) -> NodeHook:
    """As :func:`quantized_values`, and activations with one set of parameters too."""
    others = quantized_values(prepared)

    def quantized(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        module = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ObserverBase) and not isinstance(module, DATA_FREE):
            scale, zero_point = module.calculate_qparams()
            return fake_quantize(value, scale, zero_point, module.quant_min, module.quant_max)
        return others(node, args, value)

    return quantized


@contextmanager
def _unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Observers see what passes for the time of a block, and forget it at its end."""
    modules = list(modules)
    states = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
