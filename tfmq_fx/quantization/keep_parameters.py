"""Give a prepared graph the activation parameters of a quantized program of the same architecture.

What a program was quantized with besides its weights lies in its graph: scales and zero points, by timestep where they
are, the factors that channels were scaled by, the groups of the timesteps. A prepared graph of other weights has
observers in the same places. They are replaced by observers that keep those parameters to the bit. Only the exact
ranges of the temporal block are not kept: they are a function of the weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, fx

from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.program_stage import live_observers
from tfmq_fx.observers import (
    ConditionalObserver,
    GroupedObserver,
    PerChannelWeightObserver,
    UnitRangeObserver,
)
from tfmq_fx.observers.kept import KeptConditionalObserver, KeptGroupedObserver, KeptObserver, KeptParameters
from tfmq_fx.passes import ScaleChannels
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups
from tfmq_fx.quantization.activation_quantizers import ActivationQuantizer, activation_quantizers
from tfmq_fx.quantization.low_rank import add_branches
from tfmq_fx.quantization.prepare import prepare
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.same_architecture import check_interface, check_layers, refuse_architecture
from tfmq_fx.quantization.sites import numbered_operations, read_at
from tfmq_fx.temporal.calibrate import block_sites

__all__ = ["KeptQuantizers", "prepare_like"]

#: By the target of an observer, the quantizer whose parameters it keeps.
KeptQuantizers = dict[str, ActivationQuantizer]


def prepare_like(captured: fx.GraphModule, program: QuantizedProgram) -> tuple[fx.GraphModule, KeptQuantizers]:
    """Prepare a captured graph as a program was, with the program's parameters in the place of observed ones.

    Args:
        captured: The graph of a float model; it is not changed.
        program: A quantized program of the same architecture.

    Returns:
        The prepared graph, its channels scaled and branches of low rank added, and the quantizers that are kept.

    Raises:
        CaptureError: The graph has other inputs, layers or weights' shapes, or an activation is quantized in one of the
            two graphs and not in the other.
        ConfigError: Another tool chose parameters of the program.
    """
    prepared = prepare(
        captured,
        _observable(program),
        timesteps=program.timesteps,
        timestep=program.timestep,
        finite=program.finite,
    )
    check_interface(interface_of(prepared), program.interface)
    state = dataclasses.replace(PreparedState.of(prepared), config=program.config)
    state.attach(prepared)
    check_layers(prepared, program, find_temporal_block(prepared, state.timestep, finite=tuple(state.finite)))
    _keep_groups(prepared, program)
    kept = _matched(prepared, program)
    inverse: dict[str, Tensor] = {}
    for target, quantizer in kept.items():
        keeping: Any = _keeping(prepared.get_submodule(target), quantizer)
        prepared.set_submodule(target, keeping)
        if quantizer.inverse is not None:
            inverse[target] = quantizer.inverse
    ScaleChannels.by_inverse(inverse)(prepared)
    add_branches(prepared, program.config, state.timestep, tuple(state.finite))
    return prepared, kept


def _observable(program: QuantizedProgram) -> QuantizationConfig:
    """The program's configuration with an observer that is there: nothing is observed, and its own may not be."""
    config = program.config
    has_groups = find_groups(program.graph_module) is not None
    groups = config.activation_groups if has_groups else config.activation_groups or 1
    return dataclasses.replace(config, activation_range="minmax", activation_groups=groups)


def _keep_groups(prepared: fx.GraphModule, program: QuantizedProgram) -> None:
    """The group of every timestep: rows that were added later are in the groups of their neighbours."""
    for name in (GROUPS, EACH_TIMESTEP):
        if find_groups(prepared, name) is not None and find_groups(program.graph_module, name) is not None:
            setattr(prepared, name, read_attribute(program.graph_module, name).detach().clone())


def _matched(prepared: fx.GraphModule, program: QuantizedProgram) -> KeptQuantizers:
    """The quantizer in the place of each observer of an activation, but for those whose range needs no data."""
    quantizers = activation_quantizers(program.graph_module)
    unread, operations = dict(quantizers), numbered_operations(prepared)
    recomputed = {str(site.target) for site in block_sites(prepared, program.timestep)}
    matched: KeptQuantizers = {}
    for node, observer in live_observers(prepared).items():
        if isinstance(observer, PerChannelWeightObserver):
            continue
        sites = read_at([node], operations)
        found = {id(unread.get(site)): unread.pop(site, None) for site in sites}
        if str(node.target) in recomputed or isinstance(observer, UnitRangeObserver):
            continue
        (quantizer, *others) = found.values()
        if quantizer is None or others or not _is_alike(observer, quantizer):
            refuse_architecture(f"the input of {sites[0].reader} is quantized in another way")
        matched[str(node.target)] = quantizer
    if unread:
        refuse_architecture(f"the input of {next(iter(unread)).reader} is quantized in the program only")
    return matched


def _is_alike(observer: Any, quantizer: ActivationQuantizer) -> bool:
    """Whether an observer stands for parameters of this kind."""
    by_row = isinstance(observer, (GroupedObserver, ConditionalObserver))
    return (observer.quant_min, observer.quant_max) == quantizer.bounds and by_row == (quantizer.rows is not None)


def _keeping(observer: Any, quantizer: ActivationQuantizer) -> KeptParameters:
    """An observer in the place of another that keeps the parameters of a quantizer."""
    parameters, bits = (quantizer.scale, quantizer.zero_point), int(observer.quant_max + 1).bit_length() - 1
    if isinstance(observer, ConditionalObserver):
        return KeptConditionalObserver(*parameters, bits, observer.subject)
    if isinstance(observer, GroupedObserver):
        return KeptGroupedObserver(*parameters, bits, observer.subject)
    return KeptObserver(
        *parameters,
        dtype=observer.dtype,
        quant_min=observer.quant_min,
        quant_max=observer.quant_max,
        qscheme=observer.qscheme,
        subject=observer.subject,
    )
