"""Fake quantizers: they compute what the integers will, and can be trained."""

from tfmq_fx.fake_quantizers.activation import ActivationQuantizer
from tfmq_fx.fake_quantizers.grouped import GroupedQuantizer
from tfmq_fx.fake_quantizers.insertion import (
    FakeQuantizer,
    float_mode,
    insert_fake_quantizers,
    observing,
    quantizers_of,
)
from tfmq_fx.fake_quantizers.temporal import TimestepQuantizer
from tfmq_fx.fake_quantizers.weight import AdaRoundQuantizer

__all__ = [
    "ActivationQuantizer",
    "AdaRoundQuantizer",
    "FakeQuantizer",
    "GroupedQuantizer",
    "TimestepQuantizer",
    "float_mode",
    "insert_fake_quantizers",
    "observing",
    "quantizers_of",
]
