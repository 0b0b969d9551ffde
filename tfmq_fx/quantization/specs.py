"""How an activation, a weight or a result is quantized, in torchao's terms."""

from __future__ import annotations

import torch
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.observers import (
    MinMaxObserver,
    PerChannelWeightObserver,
    PerTensorObserver,
    UnitRangeObserver,
    activation_observer,
)
from tfmq_fx.observers.finite import input_of, output_of, weight_of

__all__ = ["activation_spec", "output_spec", "softmax_spec", "weight_spec"]


def activation_spec(config: QuantizationConfig, layer: str, *, exact: bool, symmetric: bool) -> QuantizationSpec:
    """One parameter set per tensor for an activation.

    Args:
        config: That of the layer.
        layer: Name of the layer that reads it.
        exact: Whether its range is that of everything it takes, as in the temporal block with ``temporal="shared"``.
        symmetric: Whether its zero point is the middle of the integers.
    """
    # A temporal range shared by all timesteps is the union of theirs; smoothing it would clip some.
    observer = MinMaxObserver if exact else activation_observer(config.activation_range).per_tensor
    return _per_tensor_spec(observer, config.activation_bits, input_of(layer), symmetric=symmetric)


def softmax_spec(config: QuantizationConfig, layer: str, *, deferred: bool) -> QuantizationSpec:
    """One parameter set per tensor for the weights of attention.

    Args:
        config: That of the layer.
        layer: Name of the product that reads them.
        deferred: Whether they are the numerators of the softmax, whose range is known.
    """
    observer = UnitRangeObserver if deferred else activation_observer(config.activation_range).per_tensor
    # Nothing of a softmax is negative: its zero point comes out as 0, and the middle would waste a bit.
    bits = config.softmax_bits or config.activation_bits
    return _per_tensor_spec(observer, bits, input_of(layer), symmetric=False)


def output_spec(config: QuantizationConfig, output: str) -> QuantizationSpec:
    """One parameter set for a result of the model, of ``config.output_bits``."""
    assert config.output_bits is not None
    observer = activation_observer(config.activation_range).per_tensor
    return _per_tensor_spec(observer, config.output_bits, output_of(output), symmetric=config.symmetric_activations)


def _per_tensor_spec(
    observer: type[PerTensorObserver], bits: int, subject: str, *, symmetric: bool
) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.uint8 if bits <= 8 else torch.int32,
        observer_or_fake_quant_ctr=observer.with_args(subject=subject),
        quant_min=0,
        quant_max=2**bits - 1,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    )


def weight_spec(config: QuantizationConfig, layer: str) -> QuantizationSpec:
    """One parameter set per output channel for a layer's weight."""
    observer = PerChannelWeightObserver.with_args(
        bits=config.weight_bits,
        symmetric=config.resolved_symmetric_weights,
        search=config.resolved_weight_range == "mse",
        subject=weight_of(layer),
    )
    wide = config.weight_bits > 8
    return QuantizationSpec(
        dtype=torch.int16 if wide else torch.int8,
        observer_or_fake_quant_ctr=observer,
        quant_min=-(2 ** (min(config.weight_bits, 16) - 1)),
        quant_max=2 ** (min(config.weight_bits, 16) - 1) - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
