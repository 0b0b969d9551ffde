"""The layers of a calibrated graph that the search chooses widths for."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from tfmq_fx.config.overrides import names_layer
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.program_stage import live_observers
from tfmq_fx.frontend.roles import find_roles
from tfmq_fx.observers import PerChannelWeightObserver
from tfmq_fx.passes.analysis.layer_names import layer_name, seen_through_observers
from tfmq_fx.passes.support.predicates import is_matmul, is_weighted
from tfmq_fx.search.widths import Widths

__all__ = ["Operand", "SearchLayer", "find_layers"]


@dataclass(frozen=True, eq=False)
class Operand:
    """What one node of a layer reads through an observer.

    Attributes:
        reader: The node.
        position: Which of its arguments it is.
        observed: The call of the observer.
        observer: The observer.
    """

    reader: fx.Node
    position: int
    observed: fx.Node
    observer: nn.Module

    @property
    def is_weight(self) -> bool:
        """Whether it is a constant."""
        return isinstance(self.observer, PerChannelWeightObserver)


@dataclass(frozen=True, eq=False)
class SearchLayer:
    """Everything that has one name, and so the same widths: a layer, the parts of one, the products of an attention.

    Attributes:
        name: As in ``overrides``.
        operands: What its nodes read through observers, in graph order.
        options: The widths that it may have, as they apply to it: without weights, those of its inputs alone count.
    """

    name: str
    operands: tuple[Operand, ...]
    options: tuple[Widths, ...]

    @property
    def weights(self) -> tuple[Operand, ...]:
        """The operands that are constants."""
        return tuple(operand for operand in self.operands if operand.is_weight)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its nodes, in graph order."""
        return tuple(dict.fromkeys(operand.reader for operand in self.operands))

    def override(self, widths: Widths) -> tuple[str, dict[str, Any]]:
        """The entry of ``overrides`` that gives it these widths."""
        values = {"activation_bits": widths.activation_bits}
        if self.weights:
            values = {"weight_bits": widths.weight_bits, **values}
        return glob.escape(self.name), values


def find_layers(
    prepared: fx.GraphModule,
    config: QuantizationConfig,
    timestep: str,
    candidates: Sequence[Widths],
    *,
    products: bool,
) -> list[SearchLayer]:
    """The layers with observers, in graph order; those that ``overrides`` names already have one option.

    Args:
        prepared: A graph prepared and calibrated with ``config``.
        config: The configuration.
        timestep: Name of the timestep input.
        candidates: What there is to choose from.
        products: Whether there is a choice for the products of attention, too; else they have the first candidate.

    Raises:
        ConfigError: There are none.
    """
    observers, operands = live_observers(prepared), dict[str, list[Operand]]()
    roles = find_roles(prepared, timestep)
    #: The sum that divides a deferred softmax is not weighed alone: it reads what the product reads.
    matmuls = [node for node in prepared.graph.nodes if is_matmul(node)]
    names = {seen_through_observers(a): layer_name(n) for n in matmuls for a in n.all_input_nodes if a in observers}
    named_roles: dict[str, frozenset[str]] = {}
    for node in prepared.graph.nodes:
        inputs = [(i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in observers]
        if not inputs or node in observers or node.op == "output":
            continue
        layer = is_weighted(node) or is_matmul(node)
        name = layer_name(node) if layer else names.get(seen_through_observers(inputs[0][1]))
        if name is None:
            continue  # the quantized result of the model
        named_roles[name] = named_roles.get(name, frozenset()) | roles.get(node, frozenset())
        operands.setdefault(name, []).extend(Operand(node, i, a, observers[a]) for i, a in inputs)
    if not operands:
        msg = "the model has no layer that is quantized, so there is nothing to search: see keep_float and temporal"
        raise ConfigError(msg)
    return [
        SearchLayer(name, tuple(own), _options(name, own, config, named_roles[name], candidates, products))
        for name, own in operands.items()
    ]


def _options(
    name: str,
    operands: list[Operand],
    config: QuantizationConfig,
    roles: frozenset[str],
    candidates: Sequence[Widths],
    products: bool,
) -> tuple[Widths, ...]:
    if any(names_layer(entry, name, roles) for entry in config.overrides):
        own = config.for_layer(name, roles)
        return (Widths(own.weight_bits, own.activation_bits),)
    if any(operand.is_weight for operand in operands):
        return tuple(candidates)
    bits = dict.fromkeys(widths.activation_bits for widths in (candidates if products else candidates[:1]))
    return tuple(Widths(each, each) for each in bits)
