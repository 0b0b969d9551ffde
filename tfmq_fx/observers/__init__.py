"""Observers: they watch tensors during calibration and give quantization parameters."""

from tfmq_fx.observers.activation import EMAMinMaxObserver, MinMaxObserver, MSEObserver, per_tensor_parameters
from tfmq_fx.observers.grouped import (
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    GroupedMSEObserver,
    GroupedObserver,
)
from tfmq_fx.observers.temporal import ConditionalObserver, TimestepObserver
from tfmq_fx.observers.weight import PerChannelWeightObserver

__all__ = [
    "ConditionalObserver",
    "EMAMinMaxObserver",
    "GroupedEMAObserver",
    "GroupedMSEObserver",
    "GroupedMinMaxObserver",
    "GroupedObserver",
    "MSEObserver",
    "MinMaxObserver",
    "PerChannelWeightObserver",
    "TimestepObserver",
    "per_tensor_parameters",
]
