"""Observers: they watch tensors during calibration and give quantization parameters."""

from tfmq_fx.observers.activation import EMAMinMaxObserver, MSEObserver
from tfmq_fx.observers.temporal import TimestepObserver
from tfmq_fx.observers.weight import PerChannelWeightObserver

__all__ = ["EMAMinMaxObserver", "MSEObserver", "PerChannelWeightObserver", "TimestepObserver"]
