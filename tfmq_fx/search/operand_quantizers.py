"""What quantizes an operand at a width that is tried: made from the observers of one calibrated graph."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx

from tfmq_fx.config.bits import FLOAT_BITS, NARROW_BITS
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.fake_quantizers import AdaRoundQuantizer
from tfmq_fx.fake_quantizers.insertion import activation_quantizer
from tfmq_fx.observers import PerChannelWeightObserver
from tfmq_fx.passes.analysis import find_shortcuts
from tfmq_fx.passes.support.nodes import read_attribute
from tfmq_fx.passes.support.predicates import is_softmax_output
from tfmq_fx.search.layers import Operand, SearchLayer
from tfmq_fx.search.widths import Widths

__all__ = ["OperandQuantizers"]


class OperandQuantizers:
    """The quantizers of all operands at all widths, made when they are first asked for.

    Args:
        prepared: The calibrated graph; it is not changed.
        config: Its configuration.
    """

    def __init__(self, prepared: fx.GraphModule, config: QuantizationConfig) -> None:
        self.prepared, self.config = prepared, config
        self.shortcuts = frozenset(find_shortcuts(prepared.graph))
        self._activations: dict[tuple[fx.Node, int], Callable[..., Tensor]] = {}
        self._weights: dict[tuple[fx.Node, int], AdaRoundQuantizer] = {}

    def weight(self, operand: Operand, bits: int) -> AdaRoundQuantizer:
        """That of a weight, rounded to nearest until it is told otherwise."""
        key = operand.observed, bits
        if key not in self._weights:
            config = Widths(bits, self.config.activation_bits).of(self.config)
            original = operand.observer
            assert isinstance(original, PerChannelWeightObserver)
            observer = PerChannelWeightObserver(
                bits=bits,
                symmetric=config.resolved_symmetric_weights,
                search=config.resolved_weight_range == "mse",
                ch_axis=original.axis,
                subject=original.subject,
            )
            self._weights[key] = AdaRoundQuantizer(observer, self.weight_of(operand))
        return self._weights[key]

    def weight_of(self, operand: Operand) -> Tensor:
        """The float weight of an operand."""
        source = operand.observed.args[0]
        assert isinstance(source, fx.Node)
        value: Tensor = read_attribute(self.prepared, str(source.target))
        return value.detach()

    def activation(self, operand: Operand, bits: int) -> Callable[..., Tensor]:
        """That of an activation: called with the value and what else the observer is called with."""
        if self.config.softmax_bits is not None and is_softmax_output(operand.observed.args[0]):
            bits = self.config.softmax_bits
        elif operand.reader in self.shortcuts:
            bits = self.config.of_shortcuts(bits)
        key = operand.observed, bits
        if key not in self._activations:
            # The copy shares what was observed; from its bounds the quantizer knows its width.
            observer = copy.copy(operand.observer)
            observer.quant_max = 2**bits - 1
            self._activations[key] = activation_quantizer(observer)
        return self._activations[key]

    @torch.no_grad()
    def __call__(self, operand: Operand, widths: Widths, value: Tensor, *further: Tensor) -> Tensor:
        """``value`` quantized and dequantized, or as it is where its width is that of float.

        Args:
            operand: Whose value it is.
            widths: Of its layer.
            value: The float value.
            further: What the observer is called with beside it.
        """
        bits = widths.weight_bits if operand.is_weight else widths.activation_bits
        if bits == FLOAT_BITS:
            return value
        if operand.is_weight:
            return self.weight(operand, bits).dequantized().to(value.dtype)
        return self.activation(operand, bits)(value, *further)

    def narrow(self, layer: SearchLayer) -> list[tuple[Operand, Widths]]:
        """The weights of a layer at those of its widths that GPTQ rounds by default, each width once."""
        widths = {option.weight_bits: option for option in reversed(layer.options) if option.weight_bits <= NARROW_BITS}
        return [(operand, option) for operand in layer.weights for option in widths.values()]
