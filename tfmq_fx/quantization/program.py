"""The quantized program: a q/dq graph with integer weights, and what is known about it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ArtefactError
from tfmq_fx.frontend.binding import Call, bind
from tfmq_fx.frontend.interface import Interface
from tfmq_fx.frontend.surroundings import in_plain_surroundings
from tfmq_fx.passes.analysis import row_lookups, row_values
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.timestep_values import ValueSearch
from tfmq_fx.quantization.fidelity import Fidelity
from tfmq_fx.quantization.requantization import Requantization
from tfmq_fx.temporal.extended_graph import ExtendedGraph
from tfmq_fx.temporal.table import TemporalChoice
from tfmq_fx.temporal.ways_out import in_program

__all__ = ["QuantizedProgram"]


@dataclass
class QuantizedProgram:
    """The result of :func:`tfmq_fx.convert`: save it, load it, lower it, or call it.

    Attributes:
        graph_module: The quantize/dequantize graph; calling it gives the reference numerics.
        config: The configuration it was quantized with.
        timestep: Name of the timestep input.
        timesteps: The timesteps that it serves, float64 ``[K]``; None for a model without a temporal block.
        kept_float: Layers that stay float on purpose, with the reason for each.
        interface: What it is called with, and the class and configuration of the model that came in.
        scheduler: Configuration of the scheduler whose timesteps it serves, when it is known.
        temporal_choices: With ``temporal="auto"``, whose rows the table holds, feature by feature, and both errors.
        fidelity: How far its results are from the float model's, on items that :func:`tfmq_fx.calibrate` kept; None
            where it kept none, as with a prepared graph that was called by itself, or an artefact from before.
        requantization: Behind :func:`tfmq_fx.requantize`, which ranges it kept and widened; no part of an artefact.
    """

    graph_module: fx.GraphModule
    config: QuantizationConfig
    interface: Interface
    timestep: str = "timestep"
    timesteps: Tensor | None = None
    kept_float: dict[str, str] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    temporal_choices: tuple[TemporalChoice, ...] = ()
    fidelity: Fidelity | None = None
    requantization: Requantization | None = None
    _extended: ExtendedGraph | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def finite(self) -> dict[str, Tensor]:
        """By name, the values of the further inputs that its table is indexed by, float64 ``[K]`` each."""
        lookups = {str(argument_node(node, 0).target): node for node in row_lookups(self.graph_module)}
        values = {name: row_values(self.graph_module, node) for name, node in lookups.items()}
        return {name: allowed for name, allowed in values.items() if name != self.timestep}

    @property
    def indexed(self) -> dict[str, Tensor]:
        """By name, the values of every input that comes from a finite set: the timestep and :attr:`finite`."""
        return self.finite if self.timesteps is None else {self.timestep: self.timesteps, **self.finite}

    @in_plain_surroundings
    @torch.no_grad()
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the graph eagerly, called like the model that came in.

        With ``unknown_timestep="extend"`` a timestep outside the table gets a row of its own, in a copy that is kept;
        :attr:`graph_module` stays as it is, and called by itself it names such a timestep.

        Raises:
            InputError: The arguments do not fit what was captured.
            TimestepError: A timestep is outside the table, and cannot be or was not to be computed.
        """
        call = bind(self.interface, args, kwargs, self.timestep)
        positional, named = call.arguments()
        return self._serving(call)(*positional, **named)

    def _serving(self, call: Call) -> fx.GraphModule:
        """The graph, with rows for the timesteps of a call where it may extend its table."""
        index = self.interface.find(self.timestep)
        timesteps = None if index is None else call.leaves[index]
        lookups = {str(argument_node(node, 0).target): node for node in row_lookups(self.graph_module)}
        if not isinstance(timesteps, Tensor) or self.timestep not in lookups:
            return self.graph_module
        if self.config.unknown_timestep != "extend" or self.config.tabulates:
            # The graph does the same; it does not know what the program can do about it.
            advice = in_program(has_block=not self.config.tabulates)
            search = ValueSearch(row_values(self.graph_module, lookups[self.timestep]))
            search.rows(timesteps, self.config.lookup, advice=advice)
            return self.graph_module
        if self._extended is None or self._extended.graph_module is not self.graph_module:
            self._extended = ExtendedGraph(self.graph_module, self.timestep)
        return self._extended.serving(timesteps)

    def __repr__(self) -> str:
        """What it is in a line; the graph alone would fill pages."""
        config, rows = self.config, 0 if self.timesteps is None else len(self.timesteps)
        fidelity = "" if self.fidelity is None else f", relative error {self.fidelity.error:.2g}"
        return (
            f"<QuantizedProgram of {self.interface.model_class or 'a model'}: W{config.weight_bits}"
            f"A{config.activation_bits}, temporal={config.temporal!r}, {rows} timesteps, {len(self.kept_float)} layers "
            f"kept float, {len(self.graph_module.graph.nodes)} nodes{fidelity}>"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedProgram:
        """A copy that shares nothing."""
        values = {entry.name: copy.deepcopy(getattr(self, entry.name), memo) for entry in fields(self) if entry.init}
        return QuantizedProgram(**values)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: an artefact is the program as data.

        Raises:
            ArtefactError: Always.
        """
        msg = "a quantized program cannot be pickled: write it with tfmq_fx.save(program, path) and load it from there"
        raise ArtefactError(msg)
