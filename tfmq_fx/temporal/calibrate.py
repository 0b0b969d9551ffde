"""Exact ranges for what never sees the sample: its layers are evaluated over a domain, without any image.

The temporal block is a function over a finite set (finite set calibration, FSC, TFMQ-DM, CVPR 2024, section 5). Where a
conditioning joins the timestep, such as SDXL's pooled text, its layers are evaluated over pairs of both; that every
timestep then gets the range of what it sees under the conditionings of calibration is our extension. In either case a
layer sees the activations and weights before it quantized, as it will in the quantized program.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.fake_quantizers import (
    ActivationQuantizer,
    FakeQuantizer,
    GroupedQuantizer,
    TimestepQuantizer,
    observing,
)
from tfmq_fx.observers import GroupedObserver, PerChannelWeightObserver, TimestepObserver
from tfmq_fx.observers.ranges import fake_quantize
from tfmq_fx.observers.timestep_ranges import ranges_of, snapshot
from tfmq_fx.passes.analysis import TemporalBlock, evaluate_temporal_nodes, find_temporal_block, outside_block
from tfmq_fx.temporal.domain import TemporalDomain, table_domain, time_path
from tfmq_fx.temporal.refusal import refused_rows

__all__ = [
    "block_sites",
    "calibrate_conditional_part",
    "calibrate_over",
    "calibrate_temporal_block",
    "conditional_sites",
]


def calibrate_temporal_block(prepared: fx.GraphModule, timestep: str = "timestep") -> int:
    """Set the parameters of every activation of the temporal block from scratch, over the timestep table.

    Args:
        prepared: A graph with timestep-indexed observers; it is updated in place.
        timestep: Name of the timestep placeholder.

    Returns:
        The number of observers that were calibrated; 0 when the graph has no table.

    Raises:
        NonFiniteError: A layer sees NaN or infinite values at a timestep; the error names both.
    """
    domain = table_domain(prepared, timestep)
    return 0 if domain is None else calibrate_over(prepared, domain, block_sites(prepared, timestep))


def calibrate_conditional_part(prepared: fx.GraphModule, domain: TemporalDomain) -> int:
    """Set the parameters per timestep of every activation behind the timestep and the conditioning from scratch.

    Args:
        prepared: A graph whose other observers are calibrated; it is updated in place.
        domain: Timesteps and conditionings.

    Returns:
        The number of observers that were calibrated; 0 when the graph has none.

    Raises:
        NonFiniteError: As :func:`calibrate_temporal_block`.
    """
    return calibrate_over(prepared, domain, conditional_sites(prepared, domain))


def block_sites(graph_module: fx.GraphModule, timestep: str = "timestep") -> list[fx.Node]:
    """The calls of observers, or fake quantizers, of activations of the temporal block, in the order of the graph.

    An observer with one range that stands behind the block's linears watches for a layer outside, over batches as all
    of that layer's observers do, and is none of them; nor is one with a range per group of timesteps, nor any where
    the configuration has the block observed over batches as well (``temporal="observed"``).
    """
    state = PreparedState.find(graph_module)
    if state is not None and state.config.temporal == "observed":
        return []
    block = find_temporal_block(graph_module, timestep)
    before_linears: set[fx.Node] = set()
    for node in reversed(block.nodes):
        if node in block.linears or any(user in before_linears for user in node.users):
            before_linears.add(node)
    return [
        node
        for node, module in _observer_calls(graph_module, block.nodes).items()
        if not isinstance(module, (PerChannelWeightObserver, GroupedObserver, GroupedQuantizer))
        and (isinstance(module, (TimestepObserver, FakeQuantizer)) or node in before_linears)
    ]


def conditional_sites(graph_module: fx.GraphModule, domain: TemporalDomain) -> list[fx.Node]:
    """The calls with parameters per timestep on a time path, but outside the temporal block.

    Its activations with one set of parameters for all timesteps keep what the calibration batches gave them: other
    layers may read them too.
    """
    outside = outside_block(time_path(graph_module, domain), find_temporal_block(graph_module, domain.timestep))
    calls = _observer_calls(graph_module, outside)
    return [node for node, module in calls.items() if isinstance(module, TimestepObserver)]


def _observer_calls(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> dict[fx.Node, ObserverBase]:
    calls = {node: graph_module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    return {node: module for node, module in calls.items() if isinstance(module, ObserverBase)}


@torch.no_grad()
def calibrate_over(graph_module: fx.GraphModule, domain: TemporalDomain, sites: Sequence[fx.Node]) -> int:
    """Give each site the range of what it sees over a domain, behind the sites before it, which are settled by then.

    Args:
        graph_module: A prepared graph. Its observers, or fake quantizers, at the sites are updated in place; others are
            left as they were, and so are all where a value is refused.
        domain: What to evaluate over. Parameters per timestep are found row by row, one range from all entries at once.
        sites: Calls of observers or fake quantizers of activations on the time path, in the order of the graph.

    Returns:
        The number of observers at the sites.

    Raises:
        NonFiniteError: A site sees NaN or infinite values; the error names the layer and the timestep.
    """
    if not sites:
        return 0
    path = time_path(graph_module, domain)
    modules = {site: graph_module.get_submodule(str(site.target)) for site in sites}
    per_timestep = [site for site, module in modules.items() if isinstance(module, TimestepObserver)]
    restore = snapshot(modules.values())
    try:
        for site in per_timestep:
            observer = modules[site]
            assert isinstance(observer, TimestepObserver)
            observer.reset()
        if domain.entry_per_row and len(per_timestep) == len(sites):
            _observe_rows(graph_module, path, domain, sites)
        else:
            for site in sites:
                observe = _observe_rows if site in per_timestep else _observe_whole
                observe(graph_module, path, domain, [site])
    except BaseException:
        restore()
        raise
    return len(set(modules.values()))


def _observe_rows(
    graph_module: fx.GraphModule, path: TemporalBlock, domain: TemporalDomain, sites: Sequence[fx.Node]
) -> None:
    """One evaluation for all of these sites: each is settled for some entries before the next one sees them."""
    observers = {site: graph_module.get_submodule(str(site.target)) for site in sites}

    def observe(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        observer = observers.get(node)
        if observer is None:
            return _quantized(graph_module, node, args, value)
        assert isinstance(observer, TimestepObserver)
        observer.observe(*args)
        if len(sites) == 1:
            # Only the ranges are needed; values of many entries would fill the memory.
            return args[1]
        return observer(*args) if isinstance(observer, TimestepQuantizer) else observer.fake_quantize(*args)

    with _preserved_observers(graph_module, path, observers.values()):
        for columns in domain.chunks():
            with refused_rows(domain, columns[domain.timestep]):
                evaluate_temporal_nodes(graph_module, path.nodes, sites, columns, hook=observe)


def _observe_whole(
    graph_module: fx.GraphModule, path: TemporalBlock, domain: TemporalDomain, sites: Sequence[fx.Node]
) -> None:
    """A range that all timesteps share is known only when all have been seen, and some graphs take one at a time."""
    quantized = partial(_quantized, graph_module)
    for site in sites:
        with _preserved_observers(graph_module, path, ()):
            source = site.args[0]
            assert isinstance(source, fx.Node)
            pieces = [
                evaluate_temporal_nodes(graph_module, path.nodes, [source], columns, hook=quantized)[0]
                for columns in domain.chunks()
            ]
        module = graph_module.get_submodule(str(site.target))
        observing_modules = [module] if isinstance(module, ActivationQuantizer) else []
        if (ranges := ranges_of(module)) is not None and ranges.items is not None:
            ranges.items.begin_schedule()
        with refused_rows(domain, domain.columns()[domain.timestep]), observing(observing_modules):
            module(torch.cat(pieces))


def _quantized(graph_module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
    """What the quantized model will have in the place of a node's value; a fake quantizer gives that by itself."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, ObserverBase) or isinstance(module, FakeQuantizer):
        return value
    if isinstance(module, TimestepObserver):
        return module.fake_quantize(*args)
    if isinstance(module, PerChannelWeightObserver):
        assert isinstance(value, Tensor)
        return module.dequantized().to(value.dtype)
    scale, zero_point = module.calculate_qparams()
    return fake_quantize(value, scale, zero_point, module.quant_min, module.quant_max)


@contextmanager
def _preserved_observers(
    graph_module: fx.GraphModule, path: TemporalBlock, sites: Collection[nn.Module]
) -> Iterator[None]:
    """Observers see what passes for the time of a block and, but for those of the sites, forget it at its end."""
    calls = _observer_calls(graph_module, path.nodes).values()
    # What a weight's observer sees is the same every time, and fake quantizers only look when they are told to.
    restore = snapshot(
        module
        for module in calls
        if not isinstance(module, (PerChannelWeightObserver, FakeQuantizer)) and module not in sites
    )
    try:
        yield
    finally:
        restore()
