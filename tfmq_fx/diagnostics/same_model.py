"""Whether a quantized program was made from the captured model, before anything is compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from tfmq_fx.diagnostics.layer_error import match_layers
from tfmq_fx.errors import ConfigError
from tfmq_fx.frontend.interface import interface_of
from tfmq_fx.passes.support.predicates import is_linear, node_value
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["check_same_model"]


def check_same_model(captured: fx.GraphModule, program: QuantizedProgram, label: str = "the program") -> None:
    """Compare configurations and layers; that the weights are of one training only the errors can show.

    Args:
        captured: The float graph.
        program: The quantized program.
        label: What the message calls the program.

    Raises:
        ConfigError: The program was made from another model.
    """
    interface = interface_of(captured)
    expected, actual = _as_json(interface.config), _as_json(program.interface.config)
    if expected and actual:
        expected["model class"], actual["model class"] = interface.model_class, program.interface.model_class
        for name in sorted({*expected, *actual}, key=lambda name: (name != "model class", name)):
            if expected.get(name) != actual.get(name):
                difference = f"its {name} is {actual.get(name)!r}, this model's {expected.get(name)!r}"
                _raise_other_model(label, difference)
    pairs, unmatched = match_layers(captured, program.graph_module)
    if not pairs:
        _raise_other_model(label, "they have no layer in common" if unmatched else "neither has a layer with a weight")
    for name, (node, other) in pairs.items():
        width, other_width = _width(node), _width(other)
        if width != other_width:
            _raise_other_model(label, f"its layer {name} has {other_width} outputs, this model's {width}")


def _raise_other_model(label: str, difference: str) -> None:
    msg = f"{label} was made from another model: {difference}; name the model that it was made from"
    raise ConfigError(msg)


def _as_json(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A diffusers configuration as JSON keeps it, without what only tells where it was loaded from."""
    fields = {name: value for name, value in (config or {}).items() if not name.startswith("_")}
    values: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return values


def _width(node: fx.Node) -> int | None:
    """Output channels of a layer."""
    value = node_value(node)
    return int(value.shape[-1 if is_linear(node) else 1]) if isinstance(value, Tensor) and value.ndim > 1 else None
