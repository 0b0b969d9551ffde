"""Serve more timesteps: the temporal block needs no data, so neither do new rows of its tables."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tfmq_fx._torch.operators import decomposed
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.frontend.program_stage import describe
from tfmq_fx.observers.ranges import asymmetric_parameters
from tfmq_fx.passes.analysis import evaluate_temporal_nodes, find_temporal_block, row_columns, row_lookups
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_call
from tfmq_fx.passes.support.timestep_values import ValueSearch, distinct_timesteps
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.temporal.values import accept_timesteps

__all__ = ["add_timesteps"]

aten = torch.ops.aten
QUANTIZE = decomposed.quantize_per_channel.default


def _gathered_table(argument: Any) -> str | None:
    """The table behind ``index_select(table, 0, rows)``, or None."""
    if not is_call(argument, aten.index_select.default):
        return None
    table = argument.args[0]
    return str(table.target) if isinstance(table, fx.Node) and table.op == "get_attr" else None


def _sites(graph_module: fx.GraphModule) -> dict[fx.Node, tuple[str, str]]:
    """The timestep-indexed quantize nodes, with the names of their scale and zero-point tables."""
    found = {}
    for node in graph_module.graph.nodes:
        if is_call(node, QUANTIZE):
            scale, zero = _gathered_table(node.args[1]), _gathered_table(node.args[2])
            if scale and zero:
                found[node] = (scale, zero)
    return found


@torch.no_grad()
def add_timesteps(program: QuantizedProgram, timesteps: Tensor | Iterable[float]) -> QuantizedProgram:
    """Return a program that serves further timesteps, without any data.

    Runs the quantized temporal block over the new timesteps and gives each its own parameters, exactly
    as finite set calibration did for the first ones; the rows that were there stay as they are. With
    ``activation_groups`` a new timestep joins the group of the nearest one that was there, the earlier row of two; so
    do layers of the timestep and the conditioning take the parameters of the nearest one, for want of conditionings.

    Args:
        program: A quantized program; it is not changed.
        timesteps: The timesteps to add; those in the table already are skipped.

    Raises:
        ConfigError: The program has no timestep table, or its table is all that is left of the temporal block. Or a
            timestep is fractional, and the captured model casts timesteps to integers.
    """
    if not isinstance(program, QuantizedProgram):
        msg = f"add_timesteps needs a quantized program, it was given {describe(program)}"
        raise ConfigError(msg)
    if program.timesteps is None:
        msg = "this program has no timestep table; quantize a model with a temporal block and pass timesteps"
        raise ConfigError(msg)
    if program.config.tabulates:
        served = ", ".join(f"{value:g}" for value in program.timesteps[:4].tolist())
        msg = (
            f"temporal={program.config.temporal!r} stored the features of {len(program.timesteps)} timesteps "
            f"({served}, …) and no block to compute others: quantize again with all timesteps, or with temporal='fsc'"
        )
        raise ConfigError(msg)
    new = copy.deepcopy(program)
    known = program.timesteps
    search = ValueSearch(known)
    wanted = distinct_timesteps(list(timesteps) if isinstance(timesteps, Iterator) else timesteps)
    _, there = search.find(wanted)
    added = wanted[~there]
    new.timesteps = torch.cat([known, added])
    graph_module = new.graph_module
    accept_timesteps(graph_module, new.timesteps, program.timestep)
    new.interface = interface_of(graph_module).called_like(program.interface)
    lookups = row_lookups(graph_module)
    if not lookups or len(added) == 0:
        return new
    block = find_temporal_block(graph_module, program.timestep)
    sites = {site: tables for site, tables in _sites(graph_module).items() if site in block}
    nearest, _ = search.nearest(added)
    for name in (GROUPS, EACH_TIMESTEP):
        if find_groups(graph_module, name) is not None:
            groups: Tensor = read_attribute(graph_module, name)
            _replace(graph_module, name, torch.cat([groups, groups[nearest]]))
    rows = len(row_columns(graph_module)[program.timestep])
    _replace(graph_module, str(lookups[0].args[1].target), new.timesteps)  # type: ignore[union-attr]
    # The timestep changes slowest, so its new rows stand behind all others.
    columns = {name: column[rows:] for name, column in row_columns(graph_module).items()}
    for name in {name for pair in sites.values() for name in pair}:
        table = read_attribute(graph_module, name)
        _replace(graph_module, name, torch.cat([table, table[-1:].expand(len(columns[program.timestep]))]))
    # In graph order: what reaches a site has passed the sites before it, whose new rows are final by then.
    for site, (scale_name, zero_name) in sites.items():
        (x,) = evaluate_temporal_nodes(graph_module, block.nodes, [site.args[0]], columns)  # type: ignore[list-item]
        low, high = x.float().flatten(1).aminmax(dim=1)
        scale, zero = asymmetric_parameters(low, high, *site.args[4:6])  # type: ignore[arg-type]
        read_attribute(graph_module, scale_name)[rows:] = scale
        read_attribute(graph_module, zero_name)[rows:] = zero
    return new


def _replace(graph_module: fx.GraphModule, name: str, value: Tensor) -> None:
    """Put a longer table in the place of a buffer, and its shape on the nodes that read it."""
    setattr(graph_module, name, value)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            node.meta["val"] = node.meta["val"].new_empty(value.shape)
