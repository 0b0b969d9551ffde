"""What is decided when a graph is prepared: one typed object that the graph carries to the later stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tfmq_fx.config.frozen_mapping import FrozenMapping, freeze
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.notes import noted, update_notes

__all__ = ["PreparedState"]

#: Where a graph carries its state: in its own metadata, and in the notes on its placeholders.
STATE_KEY = "tfmq_fx.quantization"


@dataclass(frozen=True)
class PreparedState:
    """What :class:`tfmq_fx.TFMQQuantizer` decided for a graph; calibration, reconstruction and conversion go by it.

    It is immutable, so copies of a graph share it, and only :meth:`attach` changes what a graph carries.

    Attributes:
        config: What is quantized, and how.
        timestep: Name of the timestep input.
        timesteps: The timesteps of the schedule in its order, as given; None where nothing is indexed by them.
        finite: By name, the values of the further inputs that the temporal block is indexed by.
        conditions: Names of the inputs that layers outside the temporal block depend on beside the timestep, where the
            sample does not reach.
        kept_float: Layers that stay float on purpose, with the reason for each.
        ungrouped: Layers that keep one activation range for all timesteps where others have several, with the reason.

    Raises:
        ConfigError: A field is not of its type.
    """

    config: QuantizationConfig
    timestep: str = "timestep"
    timesteps: tuple[float, ...] | None = None
    finite: Mapping[str, tuple[float, ...]] = field(default_factory=FrozenMapping)
    conditions: tuple[str, ...] = ()
    kept_float: Mapping[str, str] = field(default_factory=FrozenMapping)
    ungrouped: Mapping[str, str] = field(default_factory=FrozenMapping)

    def __post_init__(self) -> None:
        """Check and freeze every field."""
        for name in ("timesteps", "finite", "conditions", "kept_float", "ungrouped"):
            object.__setattr__(self, name, freeze(getattr(self, name)))
        valid = {
            "config": isinstance(self.config, QuantizationConfig),
            "timestep": isinstance(self.timestep, str),
            "timesteps": self.timesteps is None or (len(self.timesteps) > 0 and _are(float, self.timesteps)),
            "finite": _maps(self.finite) and all(_are(float, values) for values in self.finite.values()),
            "conditions": _are(str, self.conditions),
            "kept_float": _maps(self.kept_float) and _are(str, tuple(self.kept_float.values())),
            "ungrouped": _maps(self.ungrouped) and _are(str, tuple(self.ungrouped.values())),
        }
        if wrong := [name for name, holds in valid.items() if not holds]:
            msg = f"the state of a prepared graph cannot have {wrong[0]}={getattr(self, wrong[0])!r}"
            raise ConfigError(msg)

    @property
    def path_inputs(self) -> tuple[str, ...]:
        """Names of all inputs beside the timestep that the time path depends on: of finite sets, then conditions."""
        return (*self.finite, *self.conditions)

    def attach(self, graph_module: fx.GraphModule) -> None:
        """Let a graph carry this state, in the place of an older one.

        It is written on the module and, in place, on the notes of its placeholders, which tools that rebuild graphs
        keep (:mod:`tfmq_fx.frontend.notes`).
        """
        graph_module.meta[STATE_KEY] = self
        update_notes(graph_module)

    @classmethod
    def find(cls, graph_module: fx.GraphModule) -> PreparedState | None:
        """The state that a graph carries; None when our quantizer did not prepare it.

        Raises:
            ConfigError: What it carries is no such state, or speaks of inputs that the graph does not have.
        """
        state = noted(graph_module, STATE_KEY)
        if state is None:
            return None
        if not isinstance(state, cls):
            msg = (
                f"this graph carries a {type(state).__name__} under {STATE_KEY!r} instead of the state of a prepared "
                "graph; prepare it again with this version of tfmq_fx"
            )
            raise ConfigError(msg)
        inputs = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
        needed = (*state.path_inputs, *(() if state.timesteps is None else (state.timestep,)))
        if missing := [name for name in needed if name not in inputs]:
            msg = (
                f"this graph was prepared with an input {missing[0]!r}, but its inputs are {', '.join(inputs)}; "
                "another tool renamed or removed it: prepare the graph again"
            )
            raise ConfigError(msg)
        return state

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> PreparedState:
        """The state that a graph carries.

        Raises:
            ConfigError: It carries none, or as :meth:`find`.
        """
        state = cls.find(graph_module)
        if state is None:
            msg = (
                "this graph was not prepared with TFMQQuantizer; use tfmq_fx.prepare, or prepare_pt2e with a "
                "TFMQQuantizer"
            )
            raise ConfigError(msg)
        return state


def _are(kind: type, values: Any) -> bool:
    """Whether ``values`` is a tuple of this type."""
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


def _maps(value: Any) -> bool:
    """Whether ``value`` is a mapping of names."""
    return isinstance(value, FrozenMapping) and all(isinstance(key, str) for key in value)
