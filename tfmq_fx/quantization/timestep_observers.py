"""The step of preparation that inserts observers by timestep: temporal block, conditional part, timestep groups.

They are calls in the graph (``observer(x, rows)``), no annotations: PT2E's annotations have one parameter set.
"""

from __future__ import annotations

import warnings

from torch import fx

from tfmq_fx._torch.pt2e import Q_ANNOTATION_KEY
from tfmq_fx.config.quantization import FLOAT_BITS
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.roles import sample_inputs
from tfmq_fx.observers import ConditionalObserver, GroupedObserver, TimestepObserver, activation_observer
from tfmq_fx.observers.finite import input_of
from tfmq_fx.observers.timestep_ranges import LEAST_ITEMS
from tfmq_fx.passes import GroupTimesteps, IndexTimesteps, ObserveTemporalBlock, ObserveTimestepGroups
from tfmq_fx.passes.analysis import TemporalBlock, data_dependence, find_temporal_block, row_columns
from tfmq_fx.passes.support.predicates import fqn, is_matmul, is_softmax_output, softmax_scores
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP
from tfmq_fx.passes.temporal.index_timesteps import distinct_timesteps
from tfmq_fx.passes.temporal.observe_timestep_groups import ungrouped_layers
from tfmq_fx.quantization.equalize import watch_channels
from tfmq_fx.quantization.float_layers import FloatLayers
from tfmq_fx.quantization.quantizer_options import QuantizerOptions
from tfmq_fx.temporal.inputs import finite_values

__all__ = ["MOST_GROUPS", "insert_timestep_observers"]

#: Groups of timesteps where nobody asked for a number: the steps of a usual schedule have one each.
MOST_GROUPS = 50


def insert_timestep_observers(model: fx.GraphModule, options: QuantizerOptions) -> None:
    """Observe by timestep what the configuration gives parameters per timestep or per group of timesteps, in place.

    Observers return their input, so the graph computes what it did.

    Args:
        model: The rewritten graph (:func:`~tfmq_fx.quantization.rewrites.rewrite_for_annotation`).
        options: Of the quantizer.

    Raises:
        ConfigError: Timesteps are needed and were not given, or there is no timestep input to group by.
    """
    block, conditions = options.temporal_block(model), options.conditions(model)
    per_timestep = options.config.temporal not in ("shared", "observed", "float")
    if block and per_timestep:
        _observe_block(model, options, block)
    if conditions and per_timestep:
        _observe_conditional_part(model, options, block, conditions)
    groups = options.config.activation_groups
    if groups is None and per_timestep and (block or conditions) and _may_group(options):
        _observe_groups(model, options, block, MOST_GROUPS, least_items=LEAST_ITEMS)
    elif groups is not None and groups > 1:
        _observe_groups(model, options, block, groups)
        _warn_ungrouped(model, "timestep groups")


def _may_group(options: QuantizerOptions) -> bool:
    """Whether ranges by timestep can be had unasked: they are asymmetric, and some observers have no form for them."""
    config = options.config
    symmetric = config.symmetric_activations or config.symmetric_attention
    return not symmetric and activation_observer(config.activation_range).grouped is not None


def _index(model: fx.GraphModule, options: QuantizerOptions) -> None:
    """Give the graph the row of every item's timestep in the table of the schedule."""
    assert options.timesteps is not None
    finite, unknown = finite_values(model, options.finite), options.config.lookup
    IndexTimesteps(options.timesteps, timestep=options.timestep, unknown=unknown, finite=finite)(model)


def _observe_block(model: fx.GraphModule, options: QuantizerOptions, block: TemporalBlock) -> None:
    """One range per row of the table for what the temporal block's linears read."""
    options.required_timesteps(f"a temporal block ({len(block.linears)} linears)")
    if options.config.temporal == "cache":
        return
    _index(model, options)
    count = len(row_columns(model)[options.timestep])
    layers = FloatLayers.of(model, options.config, block)

    def make_observer(linear: fx.Node) -> TimestepObserver:
        return TimestepObserver(count, layers.activation_bits(linear), input_of(fqn(linear)))

    def select(linear: fx.Node) -> bool:
        return layers.activation_bits(linear) < FLOAT_BITS and layers.kept_by(linear) is None

    ObserveTemporalBlock(make_observer, timestep=options.timestep, select=select)(model)


def _is_eligible(layer: fx.Node, layers: FloatLayers) -> bool:
    """Whether activations of a layer are ours to observe: no other quantizer's, and quantized."""
    free = Q_ANNOTATION_KEY not in layer.meta and layers.activation_bits(layer) < FLOAT_BITS
    return free and not layers.reason(layer)


def _observe_conditional_part(
    model: fx.GraphModule, options: QuantizerOptions, block: TemporalBlock, conditions: tuple[str, ...]
) -> None:
    """One range per timestep for what depends on the timestep and the conditioning, and never on the sample."""
    timesteps = options.required_timesteps(f"layers of {options.timestep!r} and {', '.join(map(repr, conditions))}")
    _index(model, options)
    count = len(distinct_timesteps(timesteps))
    GroupTimesteps(count, EACH_TIMESTEP)(model)
    path = find_temporal_block(model, options.timestep, finite=(*options.finite, *conditions))
    layers, dependence = FloatLayers.of(model, options.config, block), data_dependence(model)

    def select(layer: fx.Node, activation: fx.Node) -> bool:
        # The path has layers of the conditioning alone too: they see the same at every timestep.
        inside = layer in path and layer not in block and options.timestep in dependence[activation]
        return inside and _is_eligible(layer, layers)

    def make_observer(layer: fx.Node, entries: int) -> ConditionalObserver:
        return ConditionalObserver(count, layers.activation_bits(layer), input_of(fqn(layer)))

    ObserveTimestepGroups(make_observer, select=select, key=layers.activation_bits, groups=EACH_TIMESTEP)(model)
    _warn_ungrouped(model, "timesteps")


def _observe_groups(
    model: fx.GraphModule, options: QuantizerOptions, block: TemporalBlock, groups: int, least_items: int = 1
) -> None:
    """One range per group of timesteps for what lies outside the temporal block and changes with the noise."""
    if options.timesteps is None:
        msg = f"activation_groups={groups} needs the timesteps to group: pass timesteps=scheduler.timesteps"
        raise ConfigError(msg)
    inputs = [str(node.target) for node in model.graph.find_nodes(op="placeholder")]
    if options.timestep not in inputs:
        msg = f"activation_groups needs the timestep: the model has no input {options.timestep!r}, only {inputs}"
        raise ConfigError(msg)
    grouped = activation_observer(options.config.activation_range).grouped
    assert grouped is not None  # the configuration's check
    _index(model, options)
    GroupTimesteps(groups)(model)
    count = min(groups, len(distinct_timesteps(options.timesteps)))
    layers, dependence = FloatLayers.of(model, options.config, block), data_dependence(model)
    noisy = {options.timestep, *(str(node.target) for node in sample_inputs(model.graph, options.timestep))}

    def select(layer: fx.Node, activation: fx.Node) -> bool:
        # What neither the sample nor the timestep reaches, such as a text's projections, is the same at every step.
        # The weights of attention have a width of their own, or a range that is known.
        weights = is_matmul(layer) and is_softmax_output(activation)
        own = weights and (options.config.softmax_bits is not None or softmax_scores(activation) is not None)
        noise = bool(noisy & dependence[activation]) and not own
        return noise and layer not in block and _is_eligible(layer, layers)

    def make_observer(layer: fx.Node, entries: int) -> GroupedObserver:
        observer = grouped(count, layers.activation_bits(layer), input_of(fqn(layer)))
        observer.pool_groups(least_items, entries)
        return observer

    ObserveTimestepGroups(make_observer, select=select, key=layers.activation_bits)(model)
    if options.config.scale_channels:
        watch_channels(model)


def _warn_ungrouped(model: fx.GraphModule, parts: str) -> None:
    if ungrouped := ungrouped_layers(model):
        layer, reason = next(iter(ungrouped.items()))
        warnings.warn(
            f"{len(ungrouped)} layers keep one activation range for all {parts}, {layer!r} for one: {reason}",
            stacklevel=3,
        )
