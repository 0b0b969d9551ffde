"""Convert: observers become quantize/dequantize pairs and weights become integers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from tfmq_fx._torch.modules import tensors_by_name
from tfmq_fx._torch.pt2e import is_prepared
from tfmq_fx.config.prepared_state import PreparedState
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.interface import INTERFACE_KEY, interface_of
from tfmq_fx.frontend.notes import ensure_calling_convention
from tfmq_fx.frontend.program_stage import CONVERTED, PREPARED, describe, live_observers, stage_of
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.passes import FINISH_CONVERSION, PropagateValues
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.passes.layout.add_low_rank_branches import is_branch
from tfmq_fx.passes.quantized.fold_weight_zero_points import dequantizes_constant
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import fqn, is_weighted
from tfmq_fx.passes.temporal.index_timesteps import distinct_timesteps
from tfmq_fx.quantization.fidelity_check import check_fidelity, check_max_error
from tfmq_fx.quantization.finite_parameters import require_finite_parameters
from tfmq_fx.quantization.float_layers import FloatLayers
from tfmq_fx.quantization.layer_outputs import accumulated_errors
from tfmq_fx.quantization.probes import drop_probes, measure, probes_of
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.temporal.domain import finite_domain
from tfmq_fx.temporal.table import TemporalChoice, float_table, tabulate

__all__ = ["convert", "program_from_graph"]

#: Frames from the body of a stage to its caller, for warnings: its own, and those of what a stage is wrapped in.
SURROUNDED = 4


@pipeline_stage
def convert(prepared: fx.GraphModule, *, max_error: float | None = None) -> QuantizedProgram:
    """Turn a calibrated graph into a quantized program; ``prepared`` is not changed.

    Weights become integers with zero point 0, and float state that nothing reads is gone. The program runs on the
    items that :func:`tfmq_fx.calibrate` kept, and says as :attr:`QuantizedProgram.fidelity` how far it is from the
    float model; above a relative error of 0.7 at a timestep a warning names the layers that are furthest off.

    Args:
        prepared: The calibrated result of :func:`tfmq_fx.prepare` or ``prepare_pt2e``.
        max_error: The largest relative error of a timestep, ``norm(quantized - float) / norm(float)``, that is
            accepted, in the place of that warning. None accepts all.

    Raises:
        CalibrationError: An observer has seen nothing, or a scale is no positive, finite number.
        ConfigError: The graph was not prepared with :class:`tfmq_fx.TFMQQuantizer`, or ``max_error`` is no number from
            0 on, or cannot be checked because the graph was not calibrated with :func:`tfmq_fx.calibrate`.
        FidelityError: The program is further from the float model than ``max_error``; the message names the worst
            timestep and the three layers that are furthest off.
    """
    allowed = check_max_error(max_error)
    if not isinstance(prepared, fx.GraphModule) or stage_of(prepared) == CONVERTED:
        msg = f"convert needs a calibrated graph, it was given {describe(prepared)}"
        raise ConfigError(msg)
    state = PreparedState.of(prepared)
    if not is_prepared(prepared):
        msg = "another tool rebuilt this prepared graph and dropped torchao's own notes; run it on the captured graph"
        raise ConfigError(msg)
    original = float_table(prepared, state.timestep) if state.config.temporal == "auto" else None
    weights = _weights(prepared)
    # The float weights are read and replaced, never written: a copy of them would only double the memory.
    program = _program(convert_pt2e(copy.deepcopy(prepared, dict(weights))), original)

    def layer_errors(timestep: float | None) -> dict[str, float]:
        probe = next(probe for probe in probes_of(prepared) if probe.timestep == timestep)
        errors = accumulated_errors(prepared, program.graph_module, probe.call.leaves)
        # A layer that stays float only has the errors of those before it.
        return {name: error for name, error in errors.items() if name not in program.kept_float}

    check_fidelity(program.fidelity, allowed, layer_errors, stacklevel=SURROUNDED)
    _copy_shared(program.graph_module, weights)
    return program


@pipeline_stage
def program_from_graph(converted: fx.GraphModule, original: fx.GraphModule | None = None) -> QuantizedProgram:
    """Wrap what ``convert_pt2e`` returned for a graph prepared with our quantizer; it is finished in place.

    Args:
        converted: The converted graph.
        original: The prepared graph with the float block as a table (:func:`float_table`), for
            ``temporal="auto"``.

    Raises:
        ConfigError: The graph was not prepared with :class:`tfmq_fx.TFMQQuantizer`, or ``temporal="auto"`` has
            no float table to compare with.
    """
    program = _program(converted, original)
    check_fidelity(program.fidelity, None, lambda _: {}, stacklevel=SURROUNDED)
    return program


def _program(converted: fx.GraphModule, original: fx.GraphModule | None) -> QuantizedProgram:
    """As :func:`program_from_graph`, which also warns."""
    if not isinstance(converted, fx.GraphModule):
        msg = f"only a converted graph makes a quantized program, this is {describe(converted)}"
        raise ConfigError(msg)
    ensure_calling_convention(converted)
    if stage_of(converted) == PREPARED:
        msg = f"only a converted graph makes a quantized program, this is {describe(converted)}"
        raise ConfigError(msg)
    state = PreparedState.of(converted)
    _convert_remaining_observers(converted)
    config = state.config
    timesteps = None if state.timesteps is None else distinct_timesteps(state.timesteps)
    choices: list[TemporalChoice] = []
    if config.tabulates and timesteps is not None:
        PropagateValues()(converted)
        finite = {name: distinct_timesteps(values) for name, values in state.finite.items()}
        domain = finite_domain(state.timestep, {state.timestep: timesteps, **finite})
        choices = tabulate(converted, domain, config, original)
    FINISH_CONVERSION.run(converted)
    require_finite_parameters(converted)
    _warn_wider_weights(converted, state)
    interface = interface_of(converted)
    converted.meta[INTERFACE_KEY] = interface
    fidelity = measure(converted, probes_of(converted))
    drop_probes(converted)
    return QuantizedProgram(
        graph_module=converted,
        config=config,
        timestep=state.timestep,
        timesteps=timesteps,
        kept_float=dict(state.kept_float),
        interface=interface,
        temporal_choices=tuple(choices),
        fidelity=fidelity,
    )


def _convert_remaining_observers(converted: fx.GraphModule) -> None:
    """Convert what observes by timestep: nncf places quantizers of its own and leaves these in the graph."""
    remaining: dict[fx.Node, Any] = dict(live_observers(converted))
    for node, observer in remaining.items():
        observer.convert(converted, node)
    if remaining:
        converted.recompile()


def _warn_wider_weights(converted: fx.GraphModule, state: PreparedState) -> None:
    """Say so where weights have more bits than asked for: nncf, for one, knows 8 bits alone and ignores a range."""
    block = find_temporal_block(converted, state.timestep, finite=tuple(state.finite))
    layers, wider = FloatLayers.of(converted, state.config, block), []
    for layer in filter(is_weighted, converted.graph.nodes):
        weight = layer.args[1]
        bits = layers.config_of(layer).weight_bits
        if isinstance(weight, fx.Node) and dequantizes_constant(weight) and bits < 8 and not is_branch(layer):
            integers: Tensor = read_attribute(converted, str(argument_node(weight, 0).target))
            channels = integers.reshape(len(integers), -1).to(torch.int32)
            levels = int((channels.amax(1) - channels.amin(1)).max()) + 1
            if levels > 2**bits:
                wider.append(f"{fqn(layer)!r} has {levels} levels for {bits} bits")
    if wider:
        warnings.warn(
            f"{len(wider)} layers have wider weights than configured ({wider[0]}): another quantizer or tool chose "
            "them; for these to be as configured use prepare_pt2e and convert_pt2e with TFMQQuantizer alone",
            stacklevel=3,
        )


def _weights(graph_module: fx.GraphModule) -> dict[int, Tensor]:
    """The tensors that the graph reads, and the views of them that observers remember, by identity."""
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    values = (read_attribute(graph_module, name) for name in names)
    places = {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
    state = (
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    )
    return {id(value): value for _, value in state if value.untyped_storage().data_ptr() in places}


def _copy_shared(graph_module: fx.GraphModule, shared: dict[int, Tensor]) -> None:
    """Give ``graph_module`` its own copy of those of the ``shared`` tensors that are still in it."""
    copies: dict[int, Any] = {}
    for module in graph_module.modules():
        for state in tensors_by_name(module):
            for name, value in state.items():
                if value is not None and id(value) in shared:
                    state[name] = copy.deepcopy(value, copies)
