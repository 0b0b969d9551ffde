"""Observers: they watch tensors during calibration and give quantization parameters."""
