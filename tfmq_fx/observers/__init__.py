"""Observers: they watch tensors during calibration and give quantization parameters."""

from tfmq_fx.observers.activation import (
    EMAMinMaxObserver,
    MinMaxObserver,
    MSEObserver,
    PerTensorObserver,
    per_tensor_parameters,
)
from tfmq_fx.observers.grouped import (
    GroupedEMAObserver,
    GroupedMinMaxObserver,
    GroupedMSEObserver,
    GroupedObserver,
)
from tfmq_fx.observers.registry import (
    ActivationObserver,
    activation_observer,
    activation_observer_names,
    register_activation_observer,
    unregister_activation_observer,
)
from tfmq_fx.observers.temporal import ConditionalObserver, TimestepObserver
from tfmq_fx.observers.unit_range import UnitRangeObserver
from tfmq_fx.observers.weight import PerChannelWeightObserver

__all__ = [
    "ActivationObserver",
    "ConditionalObserver",
    "EMAMinMaxObserver",
    "GroupedEMAObserver",
    "GroupedMSEObserver",
    "GroupedMinMaxObserver",
    "GroupedObserver",
    "MSEObserver",
    "MinMaxObserver",
    "PerChannelWeightObserver",
    "PerTensorObserver",
    "TimestepObserver",
    "UnitRangeObserver",
    "activation_observer",
    "activation_observer_names",
    "per_tensor_parameters",
    "register_activation_observer",
    "unregister_activation_observer",
]
