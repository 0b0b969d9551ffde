"""Which layers stay float, and why."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from tfmq_fx.config.quantization import FLOAT_BITS, ROLES, QuantizationConfig
from tfmq_fx.frontend.roles import find_roles
from tfmq_fx.passes.analysis import TemporalBlock
from tfmq_fx.passes.support.predicates import (
    fqn,
    is_attention,
    is_conv,
    is_float_tensor,
    is_linear,
    is_matmul,
    is_weighted,
)

__all__ = ["FloatLayers", "warn_unmatched_patterns"]

NO_ROLES: frozenset[str] = frozenset()
ATTENTION = frozenset(("attention",))


@dataclass(frozen=True, eq=False)
class FloatLayers:
    """What a configuration says of the layers of one graph.

    Attributes:
        config: The configuration.
        block: The graph's temporal block.
        roles: The roles of its layers.
    """

    config: QuantizationConfig
    block: TemporalBlock
    roles: Mapping[fx.Node, frozenset[str]]

    @classmethod
    def of(cls, model: fx.GraphModule, config: QuantizationConfig, block: TemporalBlock) -> FloatLayers:
        """Read the roles off a graph."""
        return cls(config, block, find_roles(model, block.timestep))

    def roles_of(self, layer: fx.Node) -> frozenset[str]:
        """The roles of a layer; one of the temporal block is neither the model's first nor its last."""
        roles = self.roles.get(layer, NO_ROLES)
        return roles - {"input", "output"} if layer in self.block else roles

    def config_of(self, layer: fx.Node) -> QuantizationConfig:
        """The configuration of a layer, overrides applied."""
        return self.config.for_layer(fqn(layer), self.roles_of(layer))

    def kept_by(self, layer: fx.Node) -> str | None:
        """The entry of ``keep_float`` that keeps a layer, or None."""
        return self.config.keeps_float(fqn(layer), self.roles_of(layer))

    def activation_bits(self, layer: fx.Node) -> int:
        """The width of a layer's activations, overrides applied."""
        return self.config_of(layer).activation_bits

    def reason(self, layer: fx.Node) -> str:
        """Why a layer stays float, or ``""``."""
        if not all(is_float_tensor(operand) for operand in layer.args[:2]):
            return "its operands are not floating-point tensors"
        if layer in self.block and self.config.temporal in ("float", "cache"):
            return f"temporal={self.config.temporal!r}"
        if (entry := self.kept_by(layer)) is not None:
            return f"keep_float has {entry!r}"
        config = self.config_of(layer)
        if is_matmul(layer):
            return "activation_bits=32" if config.activation_bits == FLOAT_BITS else ""
        if not (is_conv(layer) or is_linear(layer)):
            return "transposed convolutions are not quantized"
        weight = layer.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed, not stored"
        if config.weight_bits == FLOAT_BITS and config.activation_bits == FLOAT_BITS:
            return "weight_bits=32 and activation_bits=32"
        return ""

    def attention_reason(self, attention: fx.Node) -> str:
        """Why attention was left fused, or ``""`` where that is not the configuration's doing."""
        entry = self.config.keeps_float(fqn(attention), ATTENTION)
        if entry is not None:
            return f"keep_float has {entry!r}"
        config = self.config.for_layer(fqn(attention), ATTENTION)
        return "activation_bits=32" if config.activation_bits == FLOAT_BITS else ""


def warn_unmatched_patterns(model: fx.GraphModule, config: QuantizationConfig, *, stacklevel: int = 2) -> None:
    """Name the entries that change nothing: patterns that match no layer, roles that stay float whatever their width.

    Args:
        model: The graph whose layers the patterns are for.
        config: Has them in ``keep_float`` and ``overrides``.
        stacklevel: As for ``warnings.warn``, counted from the caller.
    """
    names = [fqn(node) for node in model.graph.nodes if is_weighted(node) or is_matmul(node) or is_attention(node)]
    for field, entries in (("keep_float", config.keep_float), ("overrides", tuple(config.overrides))):
        patterns = [entry for entry in entries if entry not in ROLES]
        unmatched = [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]
        if unmatched:
            listed = ", ".join(map(repr, unmatched))
            warnings.warn(f"{field} has {listed}, which matches no layer of this model", stacklevel=stacklevel + 1)
    for role in (entry for entry in ROLES if entry in config.overrides and entry in config.keep_float):
        warnings.warn(
            f"overrides has {role!r}, which keep_float leaves float: take it out of keep_float to quantize it",
            stacklevel=stacklevel + 1,
        )
