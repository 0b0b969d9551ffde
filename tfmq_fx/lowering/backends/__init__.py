"""Backends: what compiles and runs a quantized program."""
