"""The time path of a lowering: the temporal program as a first stage, which runs by itself in front of any backend."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tfmq_fx._torch import pytree
from tfmq_fx.frontend.interface import interface_of, refresh_interface
from tfmq_fx.lowering.stages import FirstStage, Stage
from tfmq_fx.passes import WidenTimesteps
from tfmq_fx.passes.support.predicates import node_value
from tfmq_fx.passes.temporal.widen_timesteps import integer_reader
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.temporal.program import TemporalProgram
from tfmq_fx.temporal.split import split_temporal

__all__ = ["TimePath", "cut_time_path", "with_float_timesteps"]


@dataclass(frozen=True, eq=False)
class TimePath:
    """A program whose temporal block is a program of its own.

    Attributes:
        temporal: The temporal program.
        first: The same as a stage of the lowered program.
        rest: The graph that is left; its last inputs are the outputs of ``first``.
    """

    temporal: TemporalProgram
    first: FirstStage
    rest: fx.GraphModule


def cut_time_path(program: QuantizedProgram, graph_module: fx.GraphModule) -> TimePath | None:
    """Cut a graph in two; None where it has no time path, or where a result is no tensor.

    Args:
        program: The quantized program.
        graph_module: Its graph, rewritten as it will be compiled; it is not changed.
    """
    returned = pytree.tree_leaves(graph_module.graph.output_node().args[0])
    if program.timesteps is None or any(not isinstance(leaf, fx.Node | None) for leaf in returned):
        return None
    split = split_temporal(graph_module, program.timestep, program.timesteps)
    if split is None:
        return None
    # Where conversion made a table, its rows are stored as configured already.
    storage = "float32" if program.config.tabulates else program.config.resolved_table
    unknown = program.config.unknown_timestep
    temporal = TemporalProgram.of(split, timesteps=program.timesteps, unknown=unknown, storage=storage)
    inputs = {str(node.target): node.name for node in split.rest.graph.nodes if node.op == "placeholder"}
    names = tuple(inputs[name] for name in split.names)
    stage = Stage(names, tuple(inputs[entry.name] for entry in split.inputs), by_row=True)
    return TimePath(temporal, FirstStage(stage, split.time, temporal), split.rest)


def with_float_timesteps(program: QuantizedProgram) -> QuantizedProgram:
    """The program, taking float32 timesteps where it was captured with integers and only ever reads them as floats.

    So its denoiser serves fractional timesteps too. The copy shares all tensors.
    """
    graph_module = program.graph_module
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder" and node.target == program.timestep]
    value = node_value(inputs[0]) if inputs else None
    if not isinstance(value, Tensor) or value.is_floating_point() or program.config.tabulates:
        return program
    if integer_reader(graph_module, program.timestep) is not None:
        return program
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    copied = copy.deepcopy(graph_module, shared)
    WidenTimesteps(timestep=program.timestep)(copied)
    refresh_interface(copied)
    interface = interface_of(copied).called_like(program.interface)
    return dataclasses.replace(program, graph_module=copied, interface=interface)
