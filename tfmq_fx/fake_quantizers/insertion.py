"""Observers of a calibrated graph become fake quantizers, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import ObserverBase

from tfmq_fx.fake_quantizers.activation import ActivationQuantizer
from tfmq_fx.fake_quantizers.grouped import GroupedQuantizer
from tfmq_fx.fake_quantizers.temporal import TimestepQuantizer
from tfmq_fx.fake_quantizers.weight import AdaRoundQuantizer
from tfmq_fx.observers import GroupedObserver, PerChannelWeightObserver, TimestepObserver
from tfmq_fx.passes.support.arguments import argument_node
from tfmq_fx.passes.support.nodes import read_attribute

__all__ = [
    "FakeQuantizer",
    "activation_quantizer",
    "float_mode",
    "insert_fake_quantizers",
    "observing",
    "quantizers_of",
]

FakeQuantizer = AdaRoundQuantizer | ActivationQuantizer | TimestepQuantizer


@torch.no_grad()
def insert_fake_quantizers(prepared: fx.GraphModule) -> int:
    """Put a fake quantizer in the place of every observer, under the same name.

    The graph then computes what the quantized model will, and converts as before. A graph that has them
    already is left alone.

    Args:
        prepared: A calibrated graph; it is changed in place.

    Returns:
        The number of observers that were replaced.

    Raises:
        CalibrationError: An observer has seen nothing.
    """
    made: dict[str, FakeQuantizer] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_module" or str(node.target) in made:
            continue
        module = prepared.get_submodule(str(node.target))
        if isinstance(module, FakeQuantizer) or not isinstance(module, ObserverBase):
            continue
        made[str(node.target)] = _fake_quantizer(prepared, node, module)
    # Only when all are made: an observer without data raises, and the graph is as it was.
    for name, quantizer in made.items():
        parent, _, attribute = name.rpartition(".")
        setattr(prepared.get_submodule(parent), attribute, quantizer)
    return len(made)


def _fake_quantizer(prepared: fx.GraphModule, node: fx.Node, observer: ObserverBase) -> FakeQuantizer:
    if isinstance(observer, PerChannelWeightObserver):
        weight = read_attribute(prepared, str(argument_node(node, 0).target))
        assert isinstance(weight, Tensor)
        return AdaRoundQuantizer(observer, weight)
    return activation_quantizer(observer)


def activation_quantizer(observer: ObserverBase) -> ActivationQuantizer | TimestepQuantizer:
    """The fake quantizer of an activation with the parameters that its observer has; called as the observer is.

    Raises:
        CalibrationError: The observer has seen nothing.
    """
    if isinstance(observer, TimestepObserver):
        return TimestepQuantizer(observer)
    return GroupedQuantizer(observer) if isinstance(observer, GroupedObserver) else ActivationQuantizer(observer)


def quantizers_of(module: nn.Module) -> dict[str, FakeQuantizer]:
    """The fake quantizers of a module by name, each once."""
    return {name: quantizer for name, quantizer in module.named_modules() if isinstance(quantizer, FakeQuantizer)}


@contextmanager
def float_mode(quantizers: Iterable[FakeQuantizer]) -> Iterator[None]:
    """Switch fake quantizers off for the time of a block."""
    quantizers = list(quantizers)
    before = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


@contextmanager
def observing(quantizers: Iterable[ActivationQuantizer | TimestepQuantizer]) -> Iterator[None]:
    """Ranges follow what is seen for the time of a block."""
    quantizers = list(quantizers)
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
