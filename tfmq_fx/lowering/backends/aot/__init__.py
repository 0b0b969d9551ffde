"""Ahead of time: an AOTInductor package that needs neither the model's source nor a compiler."""

from tfmq_fx.lowering.backends.aot.backend import AotBackend

__all__ = ["BACKEND", "AotBackend"]

BACKEND = AotBackend()
